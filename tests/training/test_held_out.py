from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from ilvr_ds.config import LossConfig
from ilvr_ds.training.held_out import HeldOut, HeldOutSet, _accuracies
from ilvr_ds.training.quarantines import Quarantines
from ilvr_ds.training.stage1 import StageOneStep

SUMS = {"ce": 6.0, "supervised": 3.0, "alignment": 1.0, "contrastive": 2.0, "slots": 4.0, "right": 3.0, "answers": 4.0}


def test_groups_become_names_that_mlflow_takes() -> None:
    """Groups are free text: MLflow refuses brackets, commas and a name that ends in a slash."""
    names = ["", "a (b), c", "level-3", "none", "計数", "比較"]
    groups = {
        f"{kind}/{name}": float(kind == "answers" and name != "none") for name in names for kind in ("right", "answers")
    }
    metrics = _accuracies(SUMS, groups, names)
    assert metrics == {
        "eval/answers": 4.0,
        "eval/answer_accuracy": 0.75,
        "eval/answer_accuracy/a _b__ c-c0084273": 0.0,
        "eval/answer_accuracy/level-3": 0.0,
        "eval/answer_accuracy/計数": 0.0,
        "eval/answer_accuracy/比較": 0.0,
    }


def test_losses_are_means_over_tokens_and_slots() -> None:
    step = SimpleNamespace(settings=LossConfig(ce_weight=1.0, align_weight=1.0, contrastive_weight=0.1))
    losses = StageOneStep.losses(step, SUMS)  # type: ignore[arg-type]
    assert {name: losses[name] for name in ("ce", "alignment", "contrastive")} == {
        "ce": 2.0,
        "alignment": 0.25,
        "contrastive": 0.5,
    }


class Step:
    """A step whose answers are given, that notes in which mode it is asked."""

    def __init__(self) -> None:
        self.student = nn.Dropout()
        self.sums = ["ce", "supervised", "right", "answers"]
        self.modes: list[bool] = []

    def prepare(self, window: Any) -> Any:
        self.modes.append(self.student.training)
        return SimpleNamespace(window=window)

    def answers(self, micro: Any, prepared: Any, totals: Any) -> torch.Tensor:
        self.modes.append(self.student.training or torch.is_grad_enabled())
        right = micro.right & micro.has_answer
        totals.add({"right": right.sum(), "answers": micro.has_answer.sum(), "ce": torch.tensor(2.0)})
        return torch.as_tensor(right)

    def losses(self, sums: dict[str, float]) -> dict[str, float]:
        return {"ce": sums["ce"]}


def micro_batch(groups: list[str], right: list[bool], has_answer: list[bool]) -> Any:
    return SimpleNamespace(groups=groups, right=torch.tensor(right), has_answer=torch.tensor(has_answer))


def test_an_evaluation_is_without_noise_and_leaves_the_student_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a student that stays in evaluation mode: from then on targets would have no noise."""
    batches = [
        micro_batch(["a", "b"], [True, False], [True, True]),
        micro_batch(["a", "a"], [True, True], [True, False]),
        micro_batch(["b"], [True], [True]),
    ]
    windows = [
        SimpleNamespace(bad=(), retries=0, ids=("1", "2", "3", "4"), micro_batches=batches[:2]),
        SimpleNamespace(bad=(), retries=1, ids=("5",), micro_batches=batches[2:]),
    ]
    step = Step()
    quarantine = Quarantines.__new__(Quarantines)
    noted: list[Any] = []
    monkeypatch.setattr(Quarantines, "add", lambda self, *arguments: noted.append(arguments))
    monkeypatch.setattr(Quarantines, "check", lambda self: None)
    sets = [HeldOutSet("", 2, ["a", "b"])]
    held_out = HeldOut(SimpleNamespace(), 0, sets, step, quarantine)  # type: ignore[arg-type]

    def iterated(self: HeldOut) -> Iterator[Any]:
        return iter(windows)

    monkeypatch.setattr(HeldOut, "_windows", iterated)
    moves: list[None] = []
    metrics = held_out(lambda: False, lambda: moves.append(None))
    assert len(moves) == 2, "one at each window"
    assert step.student.training and step.modes == [False] * 5
    assert noted == [([], [5], 1)], "bad samples, samples, retries of all windows"
    assert metrics == {
        "eval/ce": 6.0,
        "eval/answers": 4.0,
        "eval/answer_accuracy": 0.75,
        "eval/answer_accuracy/a": 1.0,
        "eval/answer_accuracy/b": 0.5,
        "eval/skipped": 0.0,
    }


def test_an_evaluation_ends_when_it_is_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a signal that is noticed at the end; and a student that stays in evaluation mode."""
    window = SimpleNamespace(bad=(), retries=0, ids=("1",), micro_batches=[micro_batch(["a"], [True], [True])])
    monkeypatch.setattr(HeldOut, "_windows", lambda self: iter([window] * 3))
    step, answers = Step(), iter([False, True])
    held_out = HeldOut(SimpleNamespace(), 0, [HeldOutSet("", 3, ["a"])], step, SimpleNamespace())  # type: ignore[arg-type]
    assert held_out(lambda: next(answers)) is None
    assert step.student.training and len(step.modes) == 2, "one window was looked at"


def test_each_set_of_a_mixture_has_its_own_figures_and_all_together_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches windows that count for another set, and a kind of task that both have in one of them alone."""
    windows = [
        SimpleNamespace(
            bad=(), retries=0, ids=("1", "2"), micro_batches=[micro_batch(["a", "b"], [True] * 2, [True] * 2)]
        ),
        SimpleNamespace(bad=(), retries=0, ids=("3",), micro_batches=[micro_batch(["a"], [False], [True])]),
        SimpleNamespace(bad=(), retries=1, ids=("4",), micro_batches=[micro_batch(["a"], [True], [True])]),
    ]
    noted: list[Any] = []
    monkeypatch.setattr(Quarantines, "add", lambda self, *arguments: noted.append(arguments))
    monkeypatch.setattr(Quarantines, "check", lambda self: None)
    monkeypatch.setattr(HeldOut, "_windows", lambda self: iter(windows))
    sets, quarantine = [HeldOutSet("x", 1, ["a", "b"]), HeldOutSet("y", 2, ["a"])], Quarantines.__new__(Quarantines)
    metrics = HeldOut(SimpleNamespace(), 0, sets, Step(), quarantine)(lambda: False)  # type: ignore[arg-type]
    assert noted == [([], [2, 2], 1)]
    assert metrics == {
        "eval/ce": 6.0, "eval/ce_by_set/x": 2.0, "eval/ce_by_set/y": 4.0,
        "eval/answers": 4.0, "eval/answer_accuracy": 0.75,
        "eval/answer_accuracy_by_set/x": 1.0, "eval/answer_accuracy_by_set/y": 0.5,
        "eval/answer_accuracy/a": pytest.approx(2 / 3), "eval/answer_accuracy/b": 1.0, "eval/skipped": 0.0,
    }  # fmt: skip
