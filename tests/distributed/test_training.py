"""Training on real ranks: the teacher follows exactly, layouts do not matter, unequal ranks never wait in vain."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import run_ranks
from tests.runs import ZERO3

PERSISTENT = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 10**6}}
ZERO2 = {"zero_optimization": {"stage": 2}}
WORKERS = "tests.distributed.workers:"


@pytest.mark.parametrize(
    ("world", "zero", "model", "offload"),
    [
        (2, PERSISTENT, {}, "cpu"),
        (2, ZERO2, {}, "none"),
        (2, ZERO3, {"lora_rank": 4}, "cpu"),
        (3, ZERO3, {}, "cpu"),
    ],
    ids=["zero3-persistent-student", "zero2", "lora", "three-ranks-with-padding"],
)
def test_teacher_equals_dense_average(
    world: int, zero: dict[str, Any], model: dict[str, Any], offload: str, tmp_path: Path
) -> None:
    """Catches shards that do not match, an update at the wrong time, and a teacher whose forward keeps old weights."""
    arguments = {"steps": 10, "zero": zero, "model": model, "offload": offload}
    for result in run_ranks(WORKERS + "momentum", world, tmp_path, **arguments):
        assert result["moved"] > 1e-4
        assert result["teacher_error"] < 1e-6
        assert result["forward_error"] < 1e-5


@pytest.mark.parametrize("zero", [ZERO3, ZERO2], ids=["zero3", "zero2"])
def test_layout_does_not_matter(zero: dict[str, Any], tmp_path: Path) -> None:
    """2 ranks x micro-batch 2 x accumulation 2 is 1 rank x 8: catches wrong normalisation and noise tied to layout."""
    two = run_ranks(
        WORKERS + "weights_after", 2, tmp_path / "two", steps=5, micro_batch_size=2, grad_accum_steps=2, zero=zero
    )[0]
    one = run_ranks(
        WORKERS + "weights_after", 1, tmp_path / "one", steps=5, micro_batch_size=8, grad_accum_steps=1, zero=zero
    )[0]
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
    for name, weight in one["weights"].items():
        # Adam divides by the root of the second moment: an element whose gradient is near its rounding moves by up
        # to the whole rate either way, so weights are compared as tensors, not element by element
        error = (weight - two["weights"][name]).norm() / weight.norm()
        assert float(error) < 1e-5, name


@pytest.mark.parametrize(("padding_side", "negatives"), [("right", "world"), ("left", "micro_batch")])
def test_mixed_batches_never_hang(padding_side: str, negatives: str, tmp_path: Path) -> None:
    """Catches any module call or collective that depends on what a rank's samples hold."""
    arguments = {"steps": 50, "padding_side": padding_side, "negatives": negatives}
    for losses in run_ranks(WORKERS + "mixed_batches", 2, tmp_path, **arguments):
        assert len(losses) == 50
        assert all(map(math.isfinite, losses))
        assert losses[-1] < losses[0]
