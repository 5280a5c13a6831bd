"""Selection and the selective-feature loss written the obvious way: one number at a time, in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Ragged:
    """Random inputs: segments of given sizes, of samples in order, with some slots of each segment filled."""

    query: Tensor
    candidates: Tensor
    offsets: Tensor
    prediction: Tensor
    selected: Tensor
    target_index: Tensor
    segment_of_slot: Tensor
    sample_of_segment: Tensor

    @staticmethod
    def draw(sizes: list[int], k: int, width: int = 7, seed: int = 0, samples: int = 2) -> Ragged:
        generator = torch.Generator().manual_seed(seed)
        M, N = len(sizes), sum(sizes)
        offsets = torch.tensor([sum(sizes[:m]) for m in range(M + 1)])
        selected = torch.full((M, k), -1)
        for m, size in enumerate(sizes):
            kept = min(size, int(torch.randint(0, k + 1, (), generator=generator)))
            selected[m, :kept] = offsets[m] + torch.randperm(size, generator=generator)[:kept]
        return Ragged(
            query=torch.randn(M, width, generator=generator, dtype=torch.float64),
            candidates=torch.randn(N, width, generator=generator, dtype=torch.float64),
            offsets=offsets,
            prediction=torch.randn(M * k, width, generator=generator, dtype=torch.float64),
            selected=selected,
            target_index=selected.flatten(),
            segment_of_slot=torch.arange(M).repeat_interleave(k),
            sample_of_segment=torch.arange(M) % samples,
        )


def cosine(a: Tensor, b: Tensor) -> float:
    x, y = a.double().tolist(), b.double().tolist()
    length_x, length_y = math.hypot(*x), math.hypot(*y)
    if length_x < 1e-8 or length_y < 1e-8:
        return 0.0
    return math.fsum(p * q for p, q in zip(x, y, strict=True)) / (length_x * length_y)


def select(
    query: Tensor,
    rows: Tensor,
    k: int,
    top_p: float,
    temperature: float,
    pool: Tensor | None = None,
    score: Tensor | None = None,
) -> tuple[list[int], float]:
    """Kept rows of one segment in order, and the entropy of its distribution."""
    scores = [cosine(row, query) for row in rows] if score is None else score.tolist()
    inside = [n for n in range(len(rows)) if pool is None or pool[n]]
    weights = [math.exp(c / temperature) if n in inside else 0.0 for n, c in enumerate(scores)]
    p = [weight / math.fsum(weights) for weight in weights] if inside else []
    kept: list[int] = []
    for n in sorted(inside, key=lambda n: (-scores[n], n)):
        if len(kept) < k and math.fsum(p[i] for i in kept) < top_p:
            kept.append(n)
    return kept, -math.fsum(x * math.log(x) for x in p if x > 0)


def losses(
    case: Ragged, temperature: float, negatives: str = "segment", noise: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """alignment [S], contrastive [S]."""
    offsets, samples = case.offsets.tolist(), case.sample_of_segment.tolist()
    segment_of_row = [m for m in range(len(offsets) - 1) for _ in range(offsets[m], offsets[m + 1])]
    alignment, contrastive = [], []
    for slot, (index, m) in enumerate(zip(case.target_index.tolist(), case.segment_of_slot.tolist(), strict=True)):
        if index < 0:
            alignment.append(0.0)
            contrastive.append(0.0)
            continue
        z = case.prediction[slot]
        target = case.candidates[index].double() + (0 if noise is None else noise[slot])
        positive = cosine(z, target)
        others = [
            math.exp(cosine(z, case.candidates[n]) / temperature)
            for n, of in enumerate(segment_of_row)
            if (of == m and n not in case.selected[m].tolist()) or (negatives == "all" and samples[of] != samples[m])
        ]
        e = math.exp(positive / temperature)
        alignment.append(1 - positive)
        contrastive.append(-math.log(e / (e + math.fsum(others))))
    return torch.tensor(alignment, dtype=torch.float64), torch.tensor(contrastive, dtype=torch.float64)
