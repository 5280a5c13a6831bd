"""The step that a run rehearses before its first: the longest samples, in the largest micro-batches."""

from __future__ import annotations

import numpy as np

from ilvr_ds.config import TrainConfig
from ilvr_ds.data.packing import like_bins
from ilvr_ds.data.plan import Int64


def longest_samples(train: TrainConfig, lengths: Int64) -> list[Int64]:
    """The micro-batches of a step on a rank, made of the longest samples: no real window exceeds it.

    The first micro-batch is as large as one can become. A data set with fewer samples repeats them.
    lengths [samples of the data set]: tokens of each.
    """
    size, samples = train.micro_batch_size, train.micro_batch_size * train.grad_accum_steps
    order = np.argsort(-lengths, kind="stable")
    if not (budget := train.micro_batch_tokens):
        return np.split(np.resize(order[:samples], samples), range(size, samples, size))
    order = np.repeat(order, -(-samples // len(order)))
    fill = _neighbours_of_most_area if train.has_free_latents else _longest_that_fit
    first = fill(lengths[order], budget, samples)
    rest = np.delete(order, first)[: samples - len(first)]
    if train.has_free_latents:
        return [
            order[first],
            *(rest[members] for members in (like_bins(lengths[rest], budget, 1) if len(rest) else [])),
        ]
    cuts, room = [], 0
    for place, length in enumerate(lengths[rest].tolist()):
        if length > room:
            cuts.append(place)
            room = budget
        room -= length
    return [order[first], *np.split(rest, cuts)[1:]]


def _longest_that_fit(descending: Int64, budget: int, most: int) -> list[int]:
    """Places of the longest sample and of the longest that still fit beside it: what is left has room for none."""
    found: list[int] = []
    place, room = 0, budget
    while place < len(descending) and len(found) < most:
        found.append(place)
        room -= int(descending[place])
        place = max(place + 1, int(np.searchsorted(-descending, -room)))
    return found


def _neighbours_of_most_area(descending: Int64, budget: int, most: int) -> list[int]:
    """Places of those samples, neighbours in order of length, that fill the budget best with a row each, all padded to
    the longest."""
    counts = np.minimum(np.minimum(budget // descending, most), np.arange(len(descending), 0, -1))
    start = int(np.argmax(counts * descending))
    return list(range(start, start + int(counts[start])))
