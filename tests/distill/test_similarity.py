from __future__ import annotations

import pytest
import torch

from ilvr_ds.distill.selection import Targets
from ilvr_ds.distill.similarity import similarity, unit_sums
from tests.ops import loops

K, D = 3, 5
SAMPLE = torch.tensor([0, 1, 3, 0, 3])
"""Of each segment; sample 2 has none."""


def targets_of(segments: slice) -> Targets:
    """Segments of 4 candidates each, with 0 to 3 kept."""
    generator = torch.Generator().manual_seed(0)
    candidates = torch.randn(4 * len(SAMPLE), D, generator=generator) + 0.5
    kept = torch.tensor([3, 2, 0, 1, 3])
    rows = torch.stack([4 * m + torch.randperm(4, generator=generator)[:K] for m in range(len(SAMPLE))])
    indices = torch.where(torch.arange(K) < kept[:, None], rows, -1)[segments]
    M = len(indices)
    return Targets(candidates, torch.empty(0), indices, kept[segments], torch.zeros(M), torch.zeros(M, D))


def by_pairs() -> tuple[float, int]:
    targets = targets_of(slice(None))
    rows = [
        (int(sample), targets.candidates[n])
        for sample, slots in zip(SAMPLE, targets.indices, strict=True)
        for n in slots
        if n >= 0
    ]
    cosines = [loops.cosine(x, y) for a, x in rows for b, y in rows if a != b]
    return sum(cosines), len(cosines)


def test_cosines_over_pairs_of_samples_need_only_sums() -> None:
    total, pairs = similarity(unit_sums(targets_of(slice(None)), SAMPLE, 4))
    assert (float(total), int(pairs)) == (pytest.approx(by_pairs()[0], rel=1e-5), by_pairs()[1])


def test_windows_on_two_ranks_are_one() -> None:
    """Segments 1 on one rank, the others, which are of other samples, on the other."""
    one = unit_sums(targets_of(slice(1, 2)), SAMPLE[1:2], 2)
    rest = torch.tensor([0, 2, 3, 4])
    whole = targets_of(slice(None))
    part = Targets(
        whole.candidates, whole.offsets, whole.indices[rest], whole.kept[rest], whole.entropy[rest], whole.query[rest]
    )
    other = unit_sums(part, SAMPLE[rest], 4)
    total, pairs = similarity(one + other)
    assert (float(total), int(pairs)) == (pytest.approx(by_pairs()[0], rel=1e-5), by_pairs()[1])


def test_targets_of_one_sample_make_no_pair() -> None:
    total, pairs = similarity(unit_sums(targets_of(slice(0, 1)), SAMPLE[:1], 1))
    assert float(total) == pytest.approx(0, abs=1e-5) and pairs == 0
