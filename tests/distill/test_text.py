from __future__ import annotations

from dataclasses import replace

import torch
from torch.nn.functional import cross_entropy

from ilvr_ds.distill.text import text_sums
from tests.golden_set import golden_set


def test_the_kinds_of_task_share_out_the_cross_entropy() -> None:
    """Catches labels that are counted for the wrong sample, and a kind that nobody asked for in another's sum."""
    golden = golden_set()
    samples = [replace(golden.encoded[i], group=group) for i, group in enumerate(["b", "other", "a", "b"])]
    collator = golden.collator()
    collator.types = {"a": 0, "b": 1, "empty": 2}
    [micro] = collator(samples, torch.arange(4).numpy(), [4]).micro_batches
    logits = torch.randn(len(micro.label_ids), 400, generator=torch.Generator().manual_seed(0))
    micro = replace(micro, label_ids=micro.label_ids % 400)
    losses = cross_entropy(logits.requires_grad_(), micro.label_ids, reduction="none")
    sums = text_sums(losses, logits.argmax(-1), micro)
    lengths = [int((sample.labels != -100).sum()) for sample in samples]
    parts = losses.split(lengths)
    wanted = [parts[2].sum(), parts[0].sum() + parts[3].sum(), torch.zeros(())]
    torch.testing.assert_close(sums["ce_by_type"], torch.stack(wanted).detach())
    assert not sums["ce_by_type"].requires_grad
    torch.testing.assert_close(sums["ce"], losses.sum())
    counts = [len(parts[2]), len(parts[0]) + len(parts[3]), 0]
    assert micro.supervised_by_type.tolist() == counts


def test_without_kinds_nothing_is_split() -> None:
    golden = golden_set()
    [micro] = golden.window([0], 1).micro_batches
    sums = text_sums(torch.zeros(len(micro.label_ids)), torch.zeros_like(micro.label_ids), micro)
    assert sums["ce_by_type"].shape == (0,) and micro.supervised_by_type.shape == (0,)


def test_the_sets_of_a_mixture_share_out_the_cross_entropy() -> None:
    golden = golden_set()
    collator = golden.collator()
    collator.set_starts = torch.tensor([0, 10, 20]).numpy()
    [micro] = collator([golden.encoded[i] for i in range(3)], torch.tensor([5, 25, 0]).numpy(), [3]).micro_batches
    losses = torch.rand(len(micro.label_ids), generator=torch.Generator().manual_seed(0), requires_grad=True)
    sums = text_sums(losses, torch.zeros_like(micro.label_ids), micro)
    parts = losses.detach().split([int((sample.labels != -100).sum()) for sample in golden.encoded[:3]])
    torch.testing.assert_close(
        sums["ce_by_set"], torch.stack([parts[0].sum() + parts[2].sum(), torch.zeros(()), parts[1].sum()])
    )
    assert not sums["ce_by_set"].requires_grad
