"""Checkpoints without DeepSpeed: a stand-in hands over one file where the student's engine hands over its own."""

from __future__ import annotations

import dataclasses
import json
import random
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ilvr_ds.checkpoint import load
from ilvr_ds.checkpoint.load import (
    check_fits,
    checkpoint_name,
    checksum_of,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    remove_old,
    saved_state,
    size_and_checksum,
)
from ilvr_ds.checkpoint.writer import CheckpointWriter
from ilvr_ds.config import CheckpointConfig, ModelConfig, OptimConfig, Recipe, RunConfig, TrackingConfig
from ilvr_ds.distill.ema import MomentumShards
from ilvr_ds.errors import UserError

NAMES = ["layers.0.weight", "norm.weight"]


class Student:
    """Keeps one number where an engine keeps a network."""

    def __init__(self, number: int = 0) -> None:
        self.number = number
        self.checkpoint_engine: Any = None

    def save_checkpoint(self, folder: str, tag: str, save_latest: bool) -> None:
        assert not save_latest, "a file `latest` would name a folder that is renamed"
        self.checkpoint_engine.save({"number": torch.tensor(self.number)}, f"{folder}/{tag}/number.pt")

    def load_checkpoint(self, folder: str, tag: str) -> tuple[str | None, dict[str, Any]]:
        file = Path(folder) / tag / "number.pt"
        if not file.exists():
            return None, {}
        self.number = int(torch.load(file)["number"])
        return str(file), {}


def shards(value: float) -> MomentumShards:
    values = [torch.full((5,), value), torch.full((2,), -value)]
    return MomentumShards([v.clone() for v in values], values, 0.9, torch.device("cpu"))


def save(folder: Path, step: int, value: float = 1.0, student: Student | None = None, background: bool = True) -> Path:
    state = {"loader": {"step": step, "samples per step": 1}, "recipe": recipe(folder, "auto").to_dict()}
    writer = CheckpointWriter(folder, student or Student(step), NAMES, shards(value), 0, 0, background)
    assert writer.start(step, {**state, "zero_stage": 3}) == background
    path, error = writer.finish()
    assert path is not None, error
    return path


def make_folder(path: Path) -> None:
    """A checkpoint without files."""
    path.mkdir(parents=True)
    state: dict[str, Any] = {"files": {}}
    (path / "state.json").write_text(json.dumps(state | {"checksum": checksum_of(state)}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run" / "checkpoints"


def recipe(folder: Path, resume: str) -> Recipe:
    run = folder.parent
    return Recipe(run=RunConfig(name=run.name, output_dir=str(run.parent)), checkpoint=CheckpointConfig(resume=resume))


def test_only_whole_checkpoints_are_listed_oldest_first(folder: Path) -> None:
    for name in ("step-00000100", "step-00000020", "step-00000300.partial", "step-1", "step-00000010-copy", "best"):
        make_folder(folder / name)
    (folder / "step-00000400").mkdir()
    (folder / "step-00000500").write_text("a file")
    assert [path.name for path in list_checkpoints(folder)] == ["step-00000020", "step-00000100"]


def test_a_run_without_a_folder_has_no_checkpoints(folder: Path) -> None:
    assert list_checkpoints(folder) == []


def test_auto_and_must_take_the_newest(folder: Path) -> None:
    for step in (9, 10, 100):
        make_folder(folder / checkpoint_name(step))
    for resume in ("auto", "must"):
        assert find_checkpoint(recipe(folder, resume)) == folder / "step-00000100"


def test_a_path_takes_that_checkpoint(folder: Path, tmp_path: Path) -> None:
    make_folder(folder / checkpoint_name(9))
    other = tmp_path / "elsewhere" / checkpoint_name(3)
    make_folder(other)
    assert find_checkpoint(recipe(folder, str(other))) == other


def test_a_new_run_starts_anew_with_auto_and_never(folder: Path) -> None:
    for resume in ("auto", "never"):
        assert find_checkpoint(recipe(folder, resume)) is None


def test_must_without_a_checkpoint_is_a_mistake(folder: Path) -> None:
    make_folder(folder / "step-00000300.partial")
    with pytest.raises(UserError, match=f"checkpoint.resume is must, but {folder} holds no complete checkpoint"):
        find_checkpoint(recipe(folder, "must"))


def test_never_does_not_write_over_an_earlier_run(folder: Path) -> None:
    make_folder(folder / checkpoint_name(9))
    with pytest.raises(UserError, match=f"checkpoint.resume is never, but {folder} holds checkpoints"):
        find_checkpoint(recipe(folder, "never"))


@pytest.mark.parametrize("wanted", ["atuo", "/nowhere/step-00000001", ""])
def test_a_path_that_is_no_checkpoint_is_a_mistake(folder: Path, wanted: str) -> None:
    with pytest.raises(UserError, match=f"'{wanted}' is not a checkpoint; valid: auto, must, never, or a folder"):
        find_checkpoint(recipe(folder, wanted))


@pytest.mark.parametrize(("keep", "left"), [(1, [30]), (2, [20, 30]), (5, [10, 20, 30]), (0, [10, 20, 30])])
def test_the_newest_are_kept(folder: Path, keep: int, left: list[int]) -> None:
    for step in (30, 10, 20):
        make_folder(folder / checkpoint_name(step))
    make_folder(folder / "step-00000001.partial")
    make_folder(folder / "best")
    removed = remove_old(folder, keep, 0)
    assert len(removed) + len(left) == 3
    names = {"best", "step-00000001.partial", *map(checkpoint_name, left)}
    assert {path.name for path in folder.iterdir()} == names


def test_multiples_of_keep_every_stay(folder: Path) -> None:
    for step in (30, 10, 20, 40):
        make_folder(folder / checkpoint_name(step))
    remove_old(folder, 1, 20)
    assert [path.name for path in list_checkpoints(folder)] == ["step-00000020", "step-00000040"]


@pytest.mark.parametrize("background", [True, False])
def test_what_is_saved_comes_back(folder: Path, background: bool) -> None:
    path = save(folder, 7, value=2.5, background=background)
    student, teacher = Student(), shards(0.0)
    state = load_checkpoint(path, student, NAMES, teacher)
    assert state == saved_state(path)
    assert (state["step"], state["world_size"], state["loader"]["step"]) == (7, 1, 7)
    assert student.number == 7
    assert [values.tolist() for values in teacher.state()] == [[2.5] * 5, [-2.5] * 2]


def test_random_numbers_go_on_where_they_stopped(folder: Path) -> None:
    def draw() -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(()))]

    draw()
    path = save(folder, 1)
    following = draw()
    draw()
    load_checkpoint(path, Student(), NAMES, shards(0.0))
    assert draw() == following


def test_another_batch_is_a_mistake_and_the_right_one_is_named(folder: Path) -> None:
    path = save(folder, 1)
    state = saved_state(path)
    state["loader"]["samples per step"] = 4
    (path / "state.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match=r"4 samples a step, this job has 1 rank .*; set train.grad_accum_steps=4"):
        check_fits(path, recipe(folder, "auto"))


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["student/number.pt", "teacher-rank-00000.safetensors", "rng-rank-00000.pt"])
@pytest.mark.parametrize("hurt", [damage, Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-1])])
def test_a_damaged_checkpoint_is_refused_by_name_and_auto_takes_the_one_before(
    folder: Path, name: str, hurt: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    older, newer = save(folder, 1), save(folder, 2)
    hurt(newer / name)
    for resume in ("must", str(newer)):
        with pytest.raises(UserError, match=f"{newer / name}: .*; take another checkpoint"):
            find_checkpoint(recipe(folder, resume))
    with caplog.at_level("WARNING", logger="ilvr_ds"):
        assert find_checkpoint(recipe(folder, "auto")) == older
    assert str(newer / name) in caplog.text
    assert list_checkpoints(folder) == [older]
    assert (folder / "step-00000002.aside-1").is_dir(), "nothing is deleted"


@pytest.mark.parametrize("place", [0, 16, -1])
def test_a_checksum_is_of_all_pieces_of_a_file(folder: Path, place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches one of the last piece alone: files are larger than what is read at a time."""
    monkeypatch.setattr(load, "CHUNK", 16)
    path = save(folder, 1)
    file = path / "student/number.pt"
    content = bytearray(file.read_bytes())
    assert size_and_checksum(file) == (len(content), zlib.crc32(content)) and len(content) > 64
    content[place] ^= 1
    file.write_bytes(content)
    assert load.first_fault(path) == f"{file}: damaged (its checksum is another)"


def test_a_damaged_state_is_found(folder: Path) -> None:
    """Catches a flipped digit, after which the file is still JSON."""
    older, newer = save(folder, 1), save(folder, 2)
    file = newer / "state.json"
    file.write_text(file.read_text().replace('"step": 2', '"step": 3', 1))
    assert find_checkpoint(recipe(folder, "auto")) == older


def test_auto_does_not_start_anew_where_no_checkpoint_is_intact(folder: Path) -> None:
    damage(save(folder, 1) / "student/number.pt")
    with pytest.raises(UserError, match=r"no checkpoint in .* is intact"):
        find_checkpoint(recipe(folder, "auto"))


def test_going_on_from_an_older_one_sets_the_newer_aside(folder: Path) -> None:
    """Catches a later restart that takes the abandoned way, and a retention that deletes the new one for the old."""
    paths = [save(folder, step) for step in (10, 20, 30)]
    assert find_checkpoint(recipe(folder, str(paths[0]))) == paths[0]
    assert list_checkpoints(folder) == paths[:1]
    assert find_checkpoint(recipe(folder, "auto")) == paths[0]


def test_a_setting_that_weights_depend_on_is_a_mistake(folder: Path) -> None:
    now = dataclasses.replace(recipe(folder, "auto"), model=ModelConfig(latent_size=4))
    with pytest.raises(UserError, match=r"made with model\.latent_size = 8, this run has 4; go on with the old value"):
        check_fits(save(folder, 1), now)


def test_other_settings_that_changed_are_named(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches a run that goes on with another rate in silence, and warnings about where files lie."""
    now = dataclasses.replace(recipe(folder, "must"), optim=OptimConfig(lr=0.5), tracking=TrackingConfig(every_steps=3))
    with caplog.at_level("WARNING", logger="ilvr_ds"):
        assert check_fits(save(folder, 7), now)["loader"]["step"] == 7
    assert [record.getMessage() for record in caplog.records] == [
        "going on with other settings: the checkpoint was made with optim.lr = 1e-05, this run has 0.5"
    ]


def test_a_teacher_of_other_weights_is_a_mistake(folder: Path) -> None:
    path = save(folder, 1)
    with pytest.raises(UserError, match="the stored teacher has other weights than this recipe trains"):
        load_checkpoint(path, Student(), ["layers.0.lora", "norm.weight"], shards(0.0))


def test_a_checkpoint_without_a_student_is_a_mistake(folder: Path) -> None:
    path = save(folder, 1)
    (path / "student" / "number.pt").unlink()
    with pytest.raises(UserError, match="DeepSpeed found no student in it"):
        load_checkpoint(path, Student(), NAMES, shards(0.0))
