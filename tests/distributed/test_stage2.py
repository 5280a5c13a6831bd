"""Stage 2 on real ranks: the authors' numbers, calls in step whatever ranks hold, starts from other runs, exact resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.test_golden import TOLERANCE, relative
from tests.distributed.test_training import PERSISTENT, ZERO2
from tests.golden_set import golden_set
from tests.ranks import run_ranks
from tests.runs import ZERO3

WORKERS = "tests.distributed.workers_stage2:"


def expected(index: int, key: str) -> torch.Tensor:
    """A golden number of stage 2; a sample without segments has those of stage 1, which are those of a plain forward."""
    golden = golden_set()
    name = golden.samples[index].id
    is_free = f"{name}.stage2.ce_loss" in golden.expected
    assert is_free or not golden.settings["samples"][index]["segments"]
    plain = {"hidden": "student_hidden"}.get(key, key)
    return golden.expected[f"{name}.stage2.{key}" if is_free else f"{name}.{plain}"]


@pytest.mark.parametrize(
    ("world", "zero", "checkpointing"),
    [(1, ZERO3, False), (2, ZERO3, False), (2, ZERO3, True), (2, PERSISTENT, False), (2, ZERO2, True)],
    ids=["1-zero3", "2-zero3", "2-zero3-checkpointing", "2-zero3-kept-weights", "2-zero2-checkpointing"],
)
def test_golden_numbers(world: int, zero: dict[str, Any], checkpointing: bool, tmp_path: Path) -> None:
    """Loss, hidden states and gradients, one by one and all in one padded micro-batch."""
    golden = golden_set()
    everyone = list(range(len(golden.samples)))
    batches = [[i] for i in everyone] + [everyone]
    arguments = {"batches": batches, "zero": zero, "checkpointing": checkpointing}
    for results in run_ranks(WORKERS + "golden_numbers", world, tmp_path, **arguments):
        for batch, result in zip(batches, results, strict=True):
            _check(batch, result, world)


def _check(batch: list[int], result: dict[str, Any], world: int) -> None:
    """Losses and gradients of a batch are means over all of its supervised tokens."""
    golden = golden_set()
    tokens = [int((golden.expected[f"{golden.samples[i].id}.labels"] != -100).sum()) for i in batch]
    for row, i in enumerate(batch):
        real = golden.expected[f"{golden.samples[i].id}.attention_mask"].bool()
        states = expected(i, "hidden")[real].double()
        error = (result["hidden"][row].double() - states).norm(dim=-1) / states.norm(dim=-1)
        assert float(error.max()) < TOLERANCE, golden.samples[i].id
    ce = sum(n * float(expected(i, "ce_loss")) for n, i in zip(tokens, batch, strict=True)) / sum(tokens)
    assert result["sums"]["ce"] / result["sums"]["supervised"] == pytest.approx(ce, rel=TOLERANCE)
    assert world * result["loss"] == pytest.approx(ce, rel=TOLERANCE)
    first = f"{golden.samples[0].id}.stage2.grad."
    names = [key.removeprefix(first) for key in golden.expected if key.startswith(first)]
    assert names
    for key in names:
        mean = sum(n / sum(tokens) * expected(i, f"grad.{key}").double() for n, i in zip(tokens, batch, strict=True))
        assert relative(result["grads"][key.replace("model.", "model.language_model.", 1)], mean) < TOLERANCE, key
