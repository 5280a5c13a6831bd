"""Checkpoints without DeepSpeed: a stand-in hands over one file where the student's engine hands over its own."""

from __future__ import annotations

import dataclasses
import json
import random
import zlib
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
    commit_of_base,
    first_fault,
    list_checkpoints,
    load_checkpoint,
    remove_old,
    saved_state,
    size_and_checksum,
)
from ilvr_ds.checkpoint.writer import CheckpointWriter
from ilvr_ds.config import CheckpointConfig, ModelConfig, OptimConfig, Recipe, RunConfig, TrackingConfig
from ilvr_ds.data.loader import WindowLoader
from ilvr_ds.data.plan import SamplePlan
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


def test_a_state_with_the_old_name_of_a_key_is_whole_and_goes_on(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """`data.shuffle_buffer` was `data.shuffle_window`, in the recipe and in what the loader's order depends on."""
    path = save(folder, 7)
    state = saved_state(path)
    state["recipe"]["data"]["shuffle_window"] = state["recipe"]["data"].pop("shuffle_buffer")
    state["loader"]["data.shuffle_window"] = 4096
    del state["checksum"]
    (path / "state.json").write_text(json.dumps(state | {"checksum": checksum_of(state)}))
    assert first_fault(path) is None
    check_fits(path, recipe(folder, "auto"))
    assert "other settings" not in caplog.text
    loaded = load_checkpoint(path, Student(), NAMES, shards(0.0))
    plan = SamplePlan((10,), seed=0, lanes=1, global_batch=1)
    for size in (4096, 8):
        identity = {"data.shuffle_buffer": size, "samples per step": 1}
        loader = WindowLoader(None, plan, identity, 0, False)  # type: ignore[arg-type]  # no window is made
        if size == 4096:
            loader.load_state_dict(loaded["loader"])
            assert loader.step == 7
        else:
            with pytest.raises(UserError, match=r"made with data\.shuffle_buffer = 4096, this run has 8"):
                loader.load_state_dict(loaded["loader"])


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


def test_the_commit_is_pinned_where_the_name_is_the_same(tmp_path: Path) -> None:
    """Of the checkpoint's run; none where it had a folder, another name, or was made before commits were kept."""
    for state, pinned in (({"model_commit": "abc"}, "abc"), ({"model_commit": None}, None), ({}, None)):
        (tmp_path / "state.json").write_text(json.dumps({"recipe": {"model": {"path": "org/name"}}, **state}))
        assert commit_of_base(tmp_path, "org/name") == pinned
        assert commit_of_base(tmp_path, "org/other") is None
    assert commit_of_base(None, "org/name") is None


def test_what_was_set_aside_goes_when_the_run_has_come_as_far_again(folder: Path) -> None:
    """Catches terabytes that nothing deletes, and a way that is lost before there is another."""
    asides = [folder / f"{checkpoint_name(step)}.aside-1" for step in (20, 30, 40)]
    for path in (*asides, folder / checkpoint_name(10), folder / checkpoint_name(19)):
        make_folder(path)
    assert remove_old(folder, 5) == []
    make_folder(folder / checkpoint_name(30))
    assert remove_old(folder, 0) == [], "0 keeps everything"
    assert remove_old(folder, 5) == asides[:2]
    assert asides[2].is_dir() and not asides[0].exists()
