"""Which rank takes which samples of a step, in which micro-batch, where micro-batches are filled by tokens.

This is a pure function of the plan and of the lengths in the index: every rank knows what all others do without asking.
Under ZeRO-3 all need equally many micro-batches, and all wait for the fullest.

A student that makes its latents itself reads a micro-batch twice: all samples in one row, and a row each, padded to the
longest (data/rollout.py). One long sample among many short ones would be many times its tokens there, so that samples
of like length stay together.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from dataclasses import dataclass

import numpy as np

from ilvr_ds.data.mixture_plan import Plan
from ilvr_ds.data.plan import Int64
from ilvr_ds.errors import UserError


@dataclass
class PackedNumbers:
    """The share of one rank in each step, in micro-batches of at most `budget` tokens.

    tokens [samples of the data set]: their lengths. has_rows: what a row each takes must fit into the budget too.
    Raises UserError where a sample is longer than the budget.
    """

    plan: Plan
    rank: int
    world: int
    tokens: Int64
    budget: int
    has_rows: bool = False

    def __post_init__(self) -> None:
        if self.budget < (longest := int(self.tokens.max())):
            raise UserError(
                f"train.micro_batch_tokens is {self.budget}, but the longest sample has {longest} tokens; set it to "
                f"{longest} or more"
            )

    def __call__(self, step: int) -> list[Int64]:
        """Sample numbers of this rank's micro-batches of optimizer step `step`; equally many on all ranks."""
        everyone = self.plan.samples(step, 0, 1)
        deal = like_bins if self.has_rows else balanced_bins
        bins = deal(self.tokens[everyone], self.budget, self.world)
        return [everyone[members] for members in bins[self.rank :: self.world]]


def balanced_bins(lengths: Int64, budget: int, multiple: int) -> list[Int64]:
    """Indices of `lengths` in bins of at most `budget`, the fullest first; none is empty.

    Longest first, each into the emptiest bin (Graham 1969): bins end nearly equal. Their number is the smallest
    multiple of `multiple` with which this works. The number of lengths must be such a multiple too, and no length may
    exceed the budget.
    """
    order = np.argsort(-lengths, kind="stable")
    count = multiple * max(1, -(-int(lengths.sum()) // (budget * multiple)))
    while True:
        bins: list[list[int]] = [[] for _ in range(count)]
        emptiest = [(0, number) for number in range(count)]
        for index in order.tolist():
            load, number = emptiest[0]
            bins[number].append(index)
            heapq.heapreplace(emptiest, (load + int(lengths[index]), number))
        if max(emptiest)[0] <= budget:
            fullest = [number for _, number in sorted(emptiest, key=lambda bin: (-bin[0], bin[1]))]
            return [np.sort(np.array(bins[number], dtype=np.int64)) for number in fullest]
        count += multiple


def like_bins(lengths: Int64, budget: int, multiple: int) -> list[Int64]:
    """Indices of `lengths` in bins of like lengths, the largest first; none is empty. As in `balanced_bins`, but what
    fits into the budget is the area of a bin: how many there are times the longest of them.

    Neighbours in order of length share a bin. With the fewest bins, the largest area is the smallest possible.
    """
    order = np.argsort(-lengths, kind="stable")
    descending = lengths[order].tolist()

    def starts(area: int) -> list[int]:
        found, place = [], 0
        while place < len(descending):
            found.append(place)
            place += area // descending[place]
        return found

    count = multiple * -(-len(starts(budget)) // multiple)
    areas = range(descending[0], budget + 1)
    area = areas[bisect_left(areas, True, key=lambda area: len(starts(area)) <= count)]
    bins = np.split(order, starts(area)[1:])
    while len(bins) < count:
        largest = max(range(len(bins)), key=lambda number: (len(bins[number]) > 1, _area(lengths[bins[number]])))
        bins[largest : largest + 1] = np.array_split(bins[largest], 2)
    return [np.sort(members) for members in sorted(bins, key=lambda members: -_area(lengths[members]))]


def _area(lengths: Int64) -> int:
    return len(lengths) * int(lengths.max())
