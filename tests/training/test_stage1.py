"""What is logged of stage 1, from sums that are given."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ilvr_ds.config import LossConfig, SelectionConfig
from ilvr_ds.distill.selection import Targets
from ilvr_ds.training.stage1 import StageOneStep, _counts

SUMS = {
    "ce": 6.0, "supervised": 3.0, "alignment": 1.0, "contrastive": 2.0, "slots": 4.0, "segments": 2.0, "entropy": 5.0,
    "cosine_top1": 1.5, "right": 3.0, "answers": 4.0, "drift": 2.0, "weight": 8.0, "pool": 16.0, "unchanged": 1.0,
    "stands_out": 3.0, "similarity": 30.0, "pairs": 40.0,
    "ce/a": 4.0, "supervised/a": 1.0, "ce/b": 0.0, "supervised/b": 0.0,
}  # fmt: skip


def metrics(selection: SelectionConfig = SelectionConfig(), **changes: float) -> dict[str, float]:  # noqa: B008
    weights = LossConfig(ce_weight=2.0, align_weight=3.0, contrastive_weight=0.5)
    step: Any = SimpleNamespace(
        settings=weights,
        selector=SimpleNamespace(settings=selection),
        teacher=SimpleNamespace(shards=SimpleNamespace(momentum=0.9)) if selection.needs_query else None,
        types=("a", "b"),
        sets=(),
        watch=lambda _: None,
    )
    step.losses = lambda sums: StageOneStep.losses(step, sums)
    return StageOneStep.metrics(step, SUMS | changes)


def test_what_is_logged_is_the_mean_and_the_total_is_weighted() -> None:
    """Catches a total that lacks a part, and a drift that is a square."""
    assert metrics() == {
        "loss/total": pytest.approx(2 * 2.0 + 3 * 0.25 + 0.5 * 0.5),
        "loss/ce": 2.0,
        "loss/alignment": 0.25,
        "loss/contrastive": 0.5,
        "loss/ce_by_type/a": 4.0,
        "select/kept_per_segment": 2.0,
        "select/entropy": 2.5,
        "select/cosine_top1": 0.75,
        "select/pool_size": 8.0,
        "select/target_similarity": 0.75,
        "teacher/drift": 0.5,
        "teacher/momentum": 0.9,
        "train/answer_accuracy": 0.75,
    }


def test_a_pool_of_what_changed_says_how_much_did() -> None:
    found = metrics(SelectionConfig(pool="changed"))
    assert found["select/unchanged"] == 0.5 and found["select/changed_share"] == 0.75


def test_without_a_teacher_nothing_of_it_is_logged() -> None:
    """Catches zeros that look like a teacher which agrees with its student, and an entropy that counts segments whose
    pool is empty."""
    found = metrics(SelectionConfig(pool="changed", by="change", unchanged="none"))
    with_one = metrics(SelectionConfig(pool="changed", by="change"))
    assert with_one.keys() - found.keys() == {"select/cosine_top1", "teacher/drift", "teacher/momentum"}
    assert found["select/entropy"] == 5.0 and with_one["select/entropy"] == 2.5
    assert all(found[name] == value for name, value in with_one.items() if name in found and name != "select/entropy")


def test_where_nothing_was_seen_nothing_is_said() -> None:
    """Catches losses, shares and a drift of 0 in an interval whose steps were all skipped."""
    assert list(metrics(**dict.fromkeys(SUMS, 0.0))) == ["teacher/momentum"]


def test_the_total_is_of_the_losses_that_there_are() -> None:
    """Catches a held-out set without latents whose latents are perfect."""
    without_latents = metrics(alignment=0.0, contrastive=0.0, slots=0.0)
    assert without_latents["loss/total"] == 2 * without_latents["loss/ce"] == 4.0
    assert "loss/alignment" not in without_latents and "loss/contrastive" not in without_latents
    without_labels = metrics(ce=0.0, supervised=0.0)
    assert without_labels["loss/total"] == pytest.approx(3 * 0.25 + 0.5 * 0.5) and "loss/ce" not in without_labels


@pytest.mark.parametrize("order", [[1, 0], [0, 1]])
def test_the_best_cosine_does_not_depend_on_the_order_of_slots(order: list[int]) -> None:
    """With selection.order: place the first slot has the first patch, not the best. A segment with an empty pool, whose
    rows are arbitrary, adds nothing."""
    candidates = torch.tensor([[1.0, 1.0], [0.0, 2.0]])
    targets = Targets(
        candidates,
        offsets=torch.tensor([0, 2, 2]),
        indices=torch.tensor([[*order, -1], [-1, -1, -1]]),
        kept=torch.tensor([2, 0], dtype=torch.int32),
        entropy=torch.zeros(2),
        query=torch.tensor([[0.0, 1.0], [0.0, 1.0]]),
    )
    micro: Any = SimpleNamespace(label_ids=[], segments=[0, 1], has_answer=torch.tensor([True]))
    assert _counts(micro, targets)["cosine_top1"] == pytest.approx(1.0)
