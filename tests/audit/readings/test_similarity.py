from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cosine_similarity

from ilvr_ds.audit.readings.similarity import effective_rank, similarity


def test_cosines_are_means_over_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    samples = [[torch.randn(3, 6, generator=generator) for _ in range(count)] for count in (2, 1, 2, 0)]
    found = similarity(samples)
    across, slots = [], []
    for m in range(2):
        mine = [segments[m] for segments in samples if m < len(segments)]
        for k in range(3):
            across += [cosine_similarity(a[k], b[k], dim=0) for i, a in enumerate(mine) for b in mine[i + 1 :]]
        slots += [cosine_similarity(x[i], x[j], dim=0) for x in mine for i in range(3) for j in range(i + 1, 3)]
    assert found["cosine_across_samples"] == pytest.approx(float(torch.stack(across).mean()), abs=1e-5)
    assert found["cosine_across_slots"] == pytest.approx(float(torch.stack(slots).mean()), abs=1e-5)
    assert found["vectors"] == 15


def test_rank_counts_directions() -> None:
    assert effective_rank(torch.eye(5)) == pytest.approx(5)
    assert effective_rank(torch.eye(5)[:1].expand(7, -1)) == pytest.approx(1, abs=1e-3)
    assert effective_rank(torch.eye(5)[[0, 1, 0, 1]]) == pytest.approx(2, abs=1e-3)


def test_nothing_to_compare() -> None:
    assert similarity([[], []])["cosine_across_samples"] is None
    assert similarity([[torch.ones(1, 4)]])["cosine_across_samples"] is None
