"""Which candidates differ from the pictures before: plain PyTorch, the one version on every device.

    change = 1 - cosine to the same place in the picture before, or to the nearest patch of all earlier pictures
    step   = sqrt(2 * change), the distance of the two unit vectors
    stands out: step > median + max(5 * MAD, 0.01), over the candidates of the picture, and > largest step / 4

A trained tower spreads a change over all patches by attention, so that no absolute threshold tells a patch that changed
from one that heard of it. Distances grow with the size of a disturbance (cosines with its square), and most patches of
a picture only hear of the change: median and median absolute deviation (MAD) say how loud that is. A few listen more
than the rest, but hear less than a quarter of the change itself.

Letters: M segments, P candidates of a segment, N candidates in all, E earlier rows, B pictures before, D features.
Nothing here reads a device value from Python, and every sum is taken in float32 (float64 for float64 inputs).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ilvr_ds.ops.reference import rank_in_segments, segment_of_rows, unit

DEVIATIONS = 5.0
"""MADs above the median from which a step stands out: 3.4 standard deviations of a normal distribution."""
PART_OF_LARGEST = 0.25
"""The part of the largest step that a step must exceed to stand out."""
NOISE = 0.01
"""Steps that differ by less count as equal: two passes in 16 bit differ by as much."""
ROWS = 4096
"""Rows that are compared at a time, which bounds memory."""


class MostChanged(NamedTuple):
    """The result of `most_changed`."""

    members: Tensor
    """[N] bool: the pool"""
    stands_out: Tensor
    """[N] bool: the candidate changed by more than most of its picture"""
    unchanged: Tensor
    """[M] bool: no candidate of the picture stands apart; all are in the pool"""


def change_at_place(candidates: Tensor, earlier: Tensor, before: Tensor) -> Tensor:
    """1 - the largest cosine of a candidate to what stood at its place: [N].

    candidates [N, D]; earlier [E, D]; before [N, B] int64: rows of `earlier`, one for each picture.
    """
    parts = []
    for rows, places in zip(torch.split(candidates, ROWS), torch.split(before, ROWS), strict=True):
        now = unit(rows)
        columns = [(now * unit(earlier[column])).sum(-1) for column in places.unbind(1)]
        parts.append(1 - torch.stack(columns).amax(0))
    return torch.cat(parts)


def change_to_nearest(candidates: Tensor, earlier: Tensor) -> Tensor:
    """1 - the largest cosine of each candidate [P, D] to any row of `earlier` [E, D]: [P]."""
    now = [unit(rows) for rows in torch.split(candidates, ROWS)]
    best: list[Tensor | None] = [None] * len(now)
    for rows in torch.split(earlier, ROWS):
        then = unit(rows)
        for i, mine in enumerate(now):
            nearest, known = (mine @ then.T).amax(1), best[i]
            best[i] = nearest if known is None else torch.maximum(known, nearest)
    return 1 - torch.cat([rows for rows in best if rows is not None])


def most_changed(change: Tensor, offsets: Tensor, least: int, most: int) -> MostChanged:
    """The pool of each segment: candidates that stand out, the most changed of them, `most` at most.

    Where fewer than `least` stand out the next in order join them, and up to `most` where none does (more than half of
    the picture changed), but never those that changed no more than the stillest candidate of the picture. A picture
    whose candidates all changed alike has all of them in its pool.
    change [N]; offsets [M + 1], where offsets[m] to offsets[m + 1] are the rows of segment m.
    """
    segment = segment_of_rows(offsets, len(change))
    step = (2 * change).clamp(min=0).sqrt()
    ranked = rank_in_segments(change, segment)
    rank = torch.empty_like(ranked).scatter_(0, ranked, torch.arange(len(change), device=change.device))
    rank = rank - offsets[segment]
    lowest, middle, highest = (_quantile(step[ranked], offsets, part) for part in (1.0, 0.5, 0.0))
    deviation = (step - middle[segment]).abs()
    spread = _quantile(deviation[rank_in_segments(deviation, segment)], offsets, 0.5)
    bar = torch.maximum(middle + (DEVIATIONS * spread).clamp(min=NOISE), PART_OF_LARGEST * highest)
    stands_out = step > bar[segment]
    unchanged = highest - lowest <= NOISE
    is_diffuse = offsets.new_zeros(len(offsets) - 1).index_add(0, segment, stands_out.long()) == 0
    joins = ((rank < least) | is_diffuse[segment]) & (step > (lowest + NOISE)[segment])
    members = (rank < most) & (stands_out | joins) | unchanged[segment]
    return MostChanged(members, stands_out, unchanged)


def _quantile(ranked: Tensor, offsets: Tensor, part: float) -> Tensor:
    """[M]: of the values [N], in descending order in each segment, the one at `part` of the segment's length.

    0.5 is the median, the lower one of two; segments without candidates have an arbitrary value.
    """
    if len(ranked) == 0:
        return ranked.new_zeros(len(offsets) - 1)
    size = offsets.diff()
    place = torch.minimum((size * part).long(), size - 1).clamp(min=0)
    return ranked[(offsets[:-1] + place).clamp(max=len(ranked) - 1)]
