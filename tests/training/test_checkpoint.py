"""Checkpoints without DeepSpeed: a stand-in writes one file where the student's engine writes its own."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ilvr_ds.config import CheckpointConfig, ModelConfig, OptimConfig, Recipe, RunConfig, TrackingConfig
from ilvr_ds.distill.momentum import MomentumShards
from ilvr_ds.errors import UserError
from ilvr_ds.training.checkpoint import (
    check_fits,
    checkpoint_name,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    remove_old,
    save_checkpoint,
    saved_state,
)

NAMES = ["layers.0.weight", "norm.weight"]


class Student:
    """Keeps one number where an engine keeps a network."""

    def __init__(self, number: int = 0) -> None:
        self.number = number

    def save_checkpoint(self, folder: str, tag: str, save_latest: bool) -> None:
        assert not save_latest, "a file `latest` would name a folder that is renamed"
        (Path(folder) / tag).mkdir()
        (Path(folder) / tag / "number").write_text(str(self.number))

    def load_checkpoint(self, folder: str, tag: str) -> tuple[str | None, dict[str, Any]]:
        file = Path(folder) / tag / "number"
        if not file.exists():
            return None, {}
        self.number = int(file.read_text())
        return str(file), {}


class BrokenStudent(Student):
    def save_checkpoint(self, folder: str, tag: str, save_latest: bool) -> None:
        super().save_checkpoint(folder, tag, save_latest)
        raise OSError("No space left on device")


def shards(value: float) -> MomentumShards:
    values = [torch.full((5,), value), torch.full((2,), -value)]
    return MomentumShards([v.clone() for v in values], values, 0.9, torch.device("cpu"))


def save(folder: Path, step: int, value: float = 1.0, student: Student | None = None) -> Path:
    state = {"loader": {"step": step}, "recipe": recipe(folder, "auto").to_dict()}
    return save_checkpoint(folder, step, student or Student(step), NAMES, shards(value), state)


def make_folder(path: Path) -> None:
    path.mkdir(parents=True)
    (path / "state.json").write_text("{}")


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
    removed = remove_old(folder, keep)
    assert len(removed) + len(left) == 3
    names = {"best", "step-00000001.partial", *map(checkpoint_name, left)}
    assert {path.name for path in folder.iterdir()} == names


def test_what_is_saved_comes_back(folder: Path) -> None:
    path = save(folder, 7, value=2.5)
    student, teacher = Student(), shards(0.0)
    state = load_checkpoint(path, student, NAMES, teacher)
    assert state == saved_state(path)
    assert (state["step"], state["world_size"], state["loader"]) == (7, 1, {"step": 7})
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


def test_an_interrupted_save_leaves_the_older_checkpoint_the_newest(folder: Path) -> None:
    older = save(folder, 1)
    with pytest.raises(OSError, match="No space"):
        save(folder, 2, student=BrokenStudent())
    assert list_checkpoints(folder) == [older]
    assert save(folder, 2) == list_checkpoints(folder)[-1], "what was left of it is no obstacle"
    assert not list(folder.glob("*.partial"))


def test_saving_a_step_again_replaces_it(folder: Path) -> None:
    save(folder, 1, value=1.0)
    path = save(folder, 1, value=2.0)
    teacher = shards(0.0)
    load_checkpoint(path, Student(), NAMES, teacher)
    assert teacher.state()[0].tolist() == [2.0] * 5


def test_another_number_of_ranks_is_a_mistake(folder: Path) -> None:
    path = save(folder, 1)
    (path / "state.json").write_text(json.dumps(saved_state(path) | {"world_size": 4}))
    with pytest.raises(UserError, match="saved by 4 ranks, this job has 1; start as many as then"):
        check_fits(path, recipe(folder, "auto"))


def test_a_setting_that_weights_depend_on_is_a_mistake(folder: Path) -> None:
    now = dataclasses.replace(recipe(folder, "auto"), model=ModelConfig(latent_size=4))
    with pytest.raises(UserError, match=r"made with model\.latent_size = 8, this run has 4; go on with the old value"):
        check_fits(save(folder, 1), now)


def test_other_settings_that_changed_are_named(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches a run that goes on with another rate in silence, and warnings about where files lie."""
    now = dataclasses.replace(recipe(folder, "must"), optim=OptimConfig(lr=0.5), tracking=TrackingConfig(every_steps=3))
    with caplog.at_level("WARNING", logger="ilvr_ds"):
        assert check_fits(save(folder, 7), now)["loader"] == {"step": 7}
    assert [record.getMessage() for record in caplog.records] == [
        "going on with other settings: the checkpoint was made with optim.lr = 1e-05, this run has 0.5"
    ]


def test_a_teacher_of_other_weights_is_a_mistake(folder: Path) -> None:
    path = save(folder, 1)
    with pytest.raises(UserError, match="the stored teacher has other weights than this recipe trains"):
        load_checkpoint(path, Student(), ["layers.0.lora", "norm.weight"], shards(0.0))


def test_a_checkpoint_without_a_student_is_a_mistake(folder: Path) -> None:
    path = save(folder, 1)
    (path / "student" / "number").unlink()
    with pytest.raises(UserError, match="DeepSpeed found no student in it"):
        load_checkpoint(path, Student(), NAMES, shards(0.0))
