"""When the momentum teacher moves: once for each step of the student, before anything reads it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ilvr_ds.distill.ema import MomentumShards
from ilvr_ds.distill.query import Context
from ilvr_ds.distill.teacher import MomentumTeacher

RATE = 0.75


class Student:
    """One weight, and how often it was asked for."""

    def __init__(self) -> None:
        self.weight = torch.tensor([4.0, -8.0])
        self.asked = 0

    def shards(self) -> Iterator[Tensor]:
        self.asked += 1
        yield self.weight


@pytest.fixture
def student() -> Student:
    return Student()


@pytest.fixture
def published() -> Tensor:
    return torch.zeros(2)


@pytest.fixture
def teacher(student: Student, published: Tensor) -> MomentumTeacher:
    shards = MomentumShards([published], [torch.zeros(2)], RATE, torch.device("cpu"))
    seen: Any = lambda *_: published.clone()  # noqa: E731
    return MomentumTeacher(seen, shards, student.shards, 1)


def read(teacher: MomentumTeacher) -> Tensor:
    window: Any = SimpleNamespace(tokens=None, context=None, micro_batches=[SimpleNamespace(ids=("a",))])
    weights: Any = teacher.read(window, window)
    return weights


def state(teacher: MomentumTeacher) -> Tensor:
    return teacher.state()[0].clone()


@pytest.mark.parametrize("look", [read, state])
def test_what_looks_at_the_teacher_sees_the_last_step(
    look: Callable[[MomentumTeacher], Tensor], teacher: MomentumTeacher, student: Student
) -> None:
    """Catches targets and checkpoints that are a step behind, and a step that counts twice."""
    assert torch.equal(look(teacher), torch.zeros(2)) and student.asked == 0, "nobody has moved"
    teacher.mark_stale()
    assert torch.equal(look(teacher), torch.tensor([1.0, -2.0]))
    assert torch.equal(look(teacher), torch.tensor([1.0, -2.0])) and student.asked == 1
    teacher.mark_stale()
    student.weight = torch.tensor([0.0, 0.0])  # not yet caught up: what the student has then
    assert torch.equal(look(teacher), torch.tensor([0.75, -1.5])) and student.asked == 2


def test_a_step_that_nobody_looked_at_counts_too(teacher: MomentumTeacher, student: Student) -> None:
    """Catches the second of two steps without a look between them taking the place of the first."""
    teacher.mark_stale()
    teacher.mark_stale()
    assert torch.equal(state(teacher), torch.tensor([1.75, -3.5])) and student.asked == 2


def test_the_drift_is_that_of_the_last_step(teacher: MomentumTeacher) -> None:
    teacher.mark_stale()
    assert teacher.take_drift().tolist() == [3.0**2 + 6.0**2, 4.0**2 + 8.0**2]
    assert teacher.take_drift().tolist() == [0, 0]


@pytest.mark.parametrize(
    ("at_once", "expected"),
    [
        (1, [range(0, 2), range(2, 5), range(5, 6), range(6, 8), range(8, 9)]),
        (2, [range(0, 5), range(5, 8), range(8, 9)]),
        (5, [range(0, 9)]),
        (99, [range(0, 9)]),
    ],
)
def test_whole_micro_batches_are_read_together(at_once: int, expected: list[range]) -> None:
    """Their number is the same on all ranks, and so is the number of calls."""
    asked: list[Any] = []

    def network(tokens: Any, features: Any, context: Any, pieces: list[range]) -> Context:
        asked.extend(pieces)
        return Context(torch.zeros(0), torch.zeros(0), torch.zeros(0))

    teacher = MomentumTeacher(network, SimpleNamespace(), lambda: iter(()), at_once)  # type: ignore[arg-type]
    micro_batches = [SimpleNamespace(ids=("sample",) * samples) for samples in (2, 3, 1, 2, 1)]
    window: Any = SimpleNamespace(tokens=None, context=None, micro_batches=micro_batches)
    teacher.read(window, torch.zeros(0))
    assert asked == expected
