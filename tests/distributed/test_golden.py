"""The authors' numbers, from the real engines: one sample at a time, and all in one micro-batch, padded or packed."""

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


@pytest.mark.parametrize(("world", "packing"), [(1, False), (2, False), (2, True)])
def test_golden_numbers(world: int, packing: bool, tmp_path: Path) -> None:
    """Catches every deviation from the published method: tokens are checked in tests/data, all the rest here."""
    golden = golden_set()
    everyone = list(range(len(golden.samples)))
    batches = [[i] for i in everyone] + [everyone]
    arguments = {"batches": batches, "packing": packing}
    for results in run_ranks("tests.distributed.workers:golden_numbers", world, tmp_path, **arguments):
        for batch, result in zip(batches, results, strict=True):
            _check_hidden(batch, result)
            _check_selection(batch, result)
            _check_losses(batch, result, world)
            _check_gradients(batch, result, [single["ce_grads"] for single in results[:-1]])


def _check_hidden(batch: list[int], result: dict[str, Any]) -> None:
    """Every token's state of the teacher and of the student."""
    golden = golden_set()
    for row, i in enumerate(batch):
        name = golden.samples[i].id
        real = golden.expected[f"{name}.attention_mask"].bool()
        for key in ("teacher_hidden", "student_hidden"):
            expected = golden.expected[f"{name}.{key}"][real].double()
            error = (result[key][row].double() - expected).norm(dim=-1) / expected.norm(dim=-1)
            assert float(error.max()) < TOLERANCE, (name, key)


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
    """One sample: its own numbers. Several: token- and slot-weighted means."""
    golden, weights, sums = golden_set(), golden_set().loss, result["sums"]
    names = [golden.samples[i].id for i in batch]
    tokens, slots = _counts(batch)
    ce = sum(n * float(golden.expected[f"{name}.ce_loss"]) for n, name in zip(tokens, names, strict=True))
    assert sums["supervised"] == world * sum(tokens)
    assert sums["ce"] == pytest.approx(world * ce, rel=TOLERANCE)
    align = [
        float(golden.expected[f"{name}.total_loss"] - weights.ce_weight * golden.expected[f"{name}.ce_loss"])
        for name in names
    ]
    alignment = sum(n * a for n, a in zip(slots, align, strict=True)) / max(1, sum(slots))
    assert result["loss"] == pytest.approx(weights.ce_weight * ce / sum(tokens) + alignment, rel=TOLERANCE)


def _check_gradients(batch: list[int], result: dict[str, Any], ce_grads: list[dict[str, torch.Tensor]]) -> None:
    """The batch's gradient is the sum over samples of a * (gradient of CE) + b * (gradient of the alignment).

    a is the sample's share of the supervised tokens, b its share of the slots. The golden gradient is that of both
    losses together, so the sum is b * golden + (a - b) * CE; the gradient of a sample's CE alone is not in the
    folder, it is our own (`ce_grads`, by sample). For one sample a = b = 1: the golden gradient.
    """
    golden = golden_set()
    tokens, slots = _counts(batch)
    prefixes = [f"{golden.samples[i].id}.grad." for i in batch]
    stored = [key.removeprefix(prefixes[0]) for key in golden.expected if key.startswith(prefixes[0])]
    assert stored
    for key in stored:
        name = key.replace("model.", "model.language_model.", 1)
        expected = torch.zeros(())
        for i, prefix, n, m in zip(batch, prefixes, tokens, slots, strict=True):
            a = n / sum(tokens)
            b = m / sum(slots) if m else a  # without slots the golden gradient is that of CE
            expected = expected + b * golden.expected[prefix + key] + (a - b) * ce_grads[i][name]
        assert relative(result["grads"][name], expected) < TOLERANCE, (batch, key)


def _counts(batch: list[int]) -> tuple[list[int], list[int]]:
    """Supervised tokens and slots with a target of each sample."""
    golden = golden_set()
    names = [golden.samples[i].id for i in batch]
    tokens = [int((golden.expected[f"{name}.labels"] != -100).sum()) for name in names]
    return tokens, [int(golden.expected.get(f"{name}.target_mask", torch.zeros(1)).sum()) for name in names]
