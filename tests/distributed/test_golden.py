"""The authors' numbers, from the real engines: one sample at a time and all in one padded micro-batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.golden_set import golden_set
from tests.ranks import run_ranks

TOLERANCE = 1e-4  # relative, fp32; the same arithmetic in another order agrees to about 1e-6


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))


@pytest.mark.parametrize("world", [1, 2])
def test_golden_numbers(world: int, tmp_path: Path) -> None:
    """Catches every deviation from the published method: tokens are checked in tests/data, all the rest here."""
    golden = golden_set()
    everyone = list(range(len(golden.samples)))
    batches = [[i] for i in everyone] + [everyone]
    for results in run_ranks("tests.distributed.workers:golden_numbers", world, tmp_path, batches=batches):
        for batch, result in zip(batches, results, strict=True):
            _check_selection(batch, result)
            _check_losses(batch, result, world)


def _check_selection(batch: list[int], result: dict[str, Any]) -> None:
    golden, seen = golden_set(), dict.fromkeys(batch, 0)
    for m, row in enumerate(result["sample"].tolist()):
        i = batch[row]
        name, j = golden.samples[i].id, seen[i]
        seen[i] += 1
        first, last = result["offsets"][m : m + 2].tolist()
        kept = result["indices"][m][result["indices"][m] >= 0] - first
        assert kept.tolist() == golden.expected[f"{name}.selected.{j}"].tolist()
        assert relative(result["cosine"][first:last], golden.expected[f"{name}.cosine.{j}"]) < TOLERANCE
        start = sum(len(golden.expected[f"{name}.selected.{s}"]) for s in range(j))
        target = golden.expected[f"{name}.targets"][start : start + len(kept)]
        assert relative(result["targets"][m][: len(kept)], target) < TOLERANCE
    for row, i in enumerate(batch):
        assert seen[i] == golden.settings["samples"][i]["segments"]
        if (user := golden.expected.get(f"{golden.samples[i].id}.user_context")) is not None:
            assert relative(result["user"][row], user.flatten()) < TOLERANCE


def _check_losses(batch: list[int], result: dict[str, Any], world: int) -> None:
    """One sample: its own numbers. Several: token- and slot-weighted means of the losses and of the gradients."""
    golden, weights, sums = golden_set(), golden_set().loss, result["sums"]
    names = [golden.samples[i].id for i in batch]
    tokens = [int((golden.expected[f"{name}.labels"] != -100).sum()) for name in names]
    ce = sum(n * float(golden.expected[f"{name}.ce_loss"]) for n, name in zip(tokens, names, strict=True))
    assert sums["supervised"] == world * sum(tokens)
    assert sums["ce"] == pytest.approx(world * ce, rel=TOLERANCE)
    slots = [int(golden.expected.get(f"{name}.target_mask", torch.zeros(1)).sum()) for name in names]
    align = [
        float(golden.expected[f"{name}.total_loss"] - weights.ce_weight * golden.expected[f"{name}.ce_loss"])
        for name in names
    ]
    alignment = sum(n * a for n, a in zip(slots, align, strict=True)) / max(1, sum(slots))
    assert result["loss"] == pytest.approx(weights.ce_weight * ce / sum(tokens) + alignment, rel=TOLERANCE)
    if len(batch) == 1:
        stored = {k: v for k, v in golden.expected.items() if k.startswith(f"{names[0]}.grad.")}
        assert stored
        for key, gradient in stored.items():
            name = key.removeprefix(f"{names[0]}.grad.").replace("model.", "model.language_model.", 1)
            assert relative(result["grads"][name], gradient) < TOLERANCE, key
