from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from ilvr_ds.checkpoint.files import saved_state
from ilvr_ds.checkpoint.load import load_checkpoint
from ilvr_ds.errors import UserError
from tests.checkpoint.stand_ins import NAMES, Student, save, shards


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


def test_a_teacher_of_other_weights_is_a_mistake(folder: Path) -> None:
    path = save(folder, 1)
    with pytest.raises(UserError, match="the stored teacher has other weights than this recipe trains"):
        load_checkpoint(path, Student(), ["layers.0.lora", "norm.weight"], shards(0.0))


def test_a_checkpoint_without_a_student_is_a_mistake(folder: Path) -> None:
    path = save(folder, 1)
    (path / "student" / "number.pt").unlink()
    with pytest.raises(UserError, match="DeepSpeed found no student in it"):
        load_checkpoint(path, Student(), NAMES, shards(0.0))
