"""From the shards of ZeRO-1 and 2, one run of the concatenated weights a rank, to those of ZeRO-3, each weight evenly.

Each element is sent once, from the rank that has it to the one that needs it, many weights in one exchange.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor

from ilvr_ds import dist

GROUP = 2**26
"""Elements of weights that are exchanged together, 256 MiB of float32; a larger weight goes alone."""

Run = tuple[int, int]
"""A range of a weight's elements: first, and one past the last."""


class EvenSlices:
    """How weights that lie in parts on the ranks become slices: of each weight, rank r has the r-th of as many even
    parts as there are ranks, the last filled up with zeros.

    runs: what this rank has of each weight, (0, 0) for nothing. sizes: elements of a slice of each weight, the same on
    every rank. Collective. Raises RuntimeError where the ranks together do not have a weight whole, once.
    """

    def __init__(self, runs: Sequence[Run], sizes: Sequence[int]) -> None:
        self.sizes = sizes
        self.runs: list[list[Run]] = [list(of_rank) for of_rank in dist.gather_on_host(runs)]
        """By rank and weight"""
        lengths = []
        for number, size in enumerate(sizes):
            end = 0
            for start, stop in sorted(of_rank[number] for of_rank in self.runs):
                if start == stop:
                    continue
                if start != end:
                    raise RuntimeError(f"of weight {number}, element {min(start, end)} lies on no rank, or on two")
                end = stop
            if end > size * dist.world_size():
                raise RuntimeError(f"weight {number} has {end} elements on all ranks, its slices only {size} each")
            lengths.append(end)
        self.groups = _groups(lengths)

    def of(self, parts: Sequence[Tensor], device: torch.device) -> Iterator[Tensor]:
        """This rank's slice of each weight, 1-dimensional, on `device`, in order.

        parts: what `runs` says, 1-dimensional, on any device. On one rank the slices are these parts. Collective: every
        rank takes all slices.
        """
        for group in self.groups:
            if dist.world_size() == 1:
                yield from (parts[number].to(device, non_blocking=True) for number in group)
            else:
                yield from self._exchanged(group, parts, device)

    def _exchanged(self, group: range, parts: Sequence[Tensor], device: torch.device) -> Iterator[Tensor]:
        mine, ranks = dist.rank(), range(dist.world_size())
        here = {number: parts[number].to(device, non_blocking=True) for number in group}
        sent = [[self._piece(here[number], number, target) for number in group] for target in ranks]
        runs = [[self._overlap(number, source, mine) for number in group] for source in ranks]
        whole = dist.all_to_all(
            torch.cat([*chain(*sent)]) if len(group) > 1 else here[group[0]],  # of one weight, its pieces in order
            [sum(map(len, pieces)) for pieces in sent],
            [sum(stop - start for start, stop in of_source) for of_source in runs],
        )
        pieces = iter(torch.split(whole, [stop - start for of_source in runs for start, stop in of_source]))
        arrived = [[(start, next(pieces)) for start, _ in of_source] for of_source in runs]
        for place, number in enumerate(group):
            found = sorted((of_source[place] for of_source in arrived), key=lambda piece: piece[0])
            values = [piece for _, piece in found if len(piece)]
            if missing := self.sizes[number] - sum(map(len, values)):
                values.append(whole.new_zeros(missing))
            yield values[0] if len(values) == 1 else torch.cat(values)

    def _piece(self, part: Tensor, number: int, target: int) -> Tensor:
        """Of this rank's part of a weight, what `target` needs."""
        start, stop = self._overlap(number, dist.rank(), target)
        begin = self.runs[dist.rank()][number][0]
        return part[start - begin : stop - begin]

    def _overlap(self, number: int, source: int, target: int) -> Run:
        """What `source` has of the slice of `target`."""
        start, stop = self.runs[source][number]
        size = self.sizes[number]
        first = max(start, target * size)
        return first, max(first, min(stop, (target + 1) * size))


def _groups(lengths: Sequence[int]) -> list[range]:
    """Neighbouring weights with at most GROUP elements together; a larger one alone."""
    groups: list[range] = []
    total = 0
    for number, length in enumerate(lengths):
        if groups and total + length <= GROUP:
            groups[-1], total = range(groups[-1].start, number + 1), total + length
        else:
            groups.append(range(number, number + 1))
            total = length
    return groups
