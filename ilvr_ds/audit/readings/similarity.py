"""How alike latents are: across samples, across the slots of a segment, and how many directions they take.

n vectors, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

MOST = 2048
"""Vectors whose rank is looked at, evenly spread."""


def similarity(samples: Sequence[Sequence[Tensor]]) -> dict[str, Any]:
    """Of the latents of samples, each a list of segments [K, D]; None where there is nothing to compare.

    cosine_across_samples: mean over the same slot of the same segment of two samples. cosine_across_slots: mean over
    two slots of a segment. effective_rank: exp of the entropy of the singular values of all vectors at length 1 (Roy
    and Vetterli 2007); 1 where all are the same, at most the smaller of `vectors` and D.
    """
    places: dict[tuple[int, int], list[Tensor]] = {}
    slots: list[tuple[float, int]] = []
    for segments in samples:
        for m, latents in enumerate(segments):
            unit = normalize(latents.float(), dim=-1)
            slots.append(_pairs(unit))
            for k, row in enumerate(unit):
                places.setdefault((m, k), []).append(row)
    if not places:
        return {"cosine_across_samples": None, "cosine_across_slots": None, "effective_rank": None, "vectors": 0}
    everything = torch.stack([row for rows in places.values() for row in rows])
    across = [_pairs(torch.stack(rows)) for rows in places.values()]
    step = -(-len(everything) // MOST)
    return {
        "cosine_across_samples": _mean(across),
        "cosine_across_slots": _mean(slots),
        "effective_rank": effective_rank(everything[::step]),
        "vectors": len(everything[::step]),
    }


def effective_rank(unit: Tensor) -> float:
    """Of vectors [n, D] of length 1."""
    gram = unit @ unit.T if len(unit) <= unit.shape[1] else unit.T @ unit
    values = torch.linalg.eigvalsh(gram.double()).clamp(min=0).sqrt()
    shares = values / values.sum()
    return float(torch.exp(-(shares * shares.clamp(min=1e-30).log()).sum()))


def _pairs(unit: Tensor) -> tuple[float, int]:
    """Sum of the cosines of all pairs of different rows, and how many pairs there are."""
    n = len(unit)
    total = unit.sum(0)
    return float((total @ total - (unit * unit).sum()) / 2), n * (n - 1) // 2


def _mean(parts: Sequence[tuple[float, int]]) -> float | None:
    count = sum(pairs for _, pairs in parts)
    return sum(total for total, _ in parts) / count if count else None
