"""Candidates of a window: runs of neighbouring patches of helper images, and what the pools select among.

With P >= group_size merged patches, runs of P // group_size of them are averaged and the rest is dropped. All index
tensors are made here, on the CPU. The letters are those of `ilvr_ds.data.window`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ilvr_ds.config import Compare, Pool
from ilvr_ds.data.images import Grid
from ilvr_ds.data.template import EncodedSample
from ilvr_ds.data.window import Before, Candidates, Search

Int64 = NDArray[np.int64]
Bool = NDArray[np.bool_]
Order = list[tuple[int, int]]
"""Segments of the window, each as (sample, number in the sample)."""
Starts = list[tuple[Int64, Int64]]
"""For each sample the first feature row of each input image and of each helper image."""


@dataclass(frozen=True)
class CandidateLayout:
    """Lays out the candidates of windows; its settings are fixed for a run."""

    merge_size: int
    group_size: int
    pool: Pool = "all"
    compare: Compare = "place"

    def __call__(self, samples: list[EncodedSample], order: Order, starts: Starts) -> tuple[Int64, Candidates]:
        """The segments' offsets [M + 1], and the Candidates that hold them too."""
        runs = [self._runs(starts[i][1][m], _helper(samples[i], m)) for i, m in order]
        offsets = np.cumsum([0, *map(len, runs)], dtype=np.int64)
        rows, weights = _table(runs)
        return offsets, Candidates(
            rows=rows,
            weights=weights,
            offsets=torch.from_numpy(offsets),
            before=self._before(samples, order, starts, offsets) if self.pool == "changed" else None,
            in_region=self._in_region(samples, order) if self.pool == "region" else None,
        )

    def _merged(self, grid: Grid) -> tuple[int, int]:
        return grid[0] // self.merge_size, grid[1] // self.merge_size

    def _runs(self, start: int, grid: Grid) -> Int64:
        """[P, R]: feature rows of each candidate of an image whose first row is `start`."""
        rows, columns = self._merged(grid)
        count = rows * columns
        run, kept = max(1, count // self.group_size), min(count, self.group_size)
        return start + np.arange(kept * run, dtype=np.int64).reshape(kept, run)

    def _before(self, samples: list[EncodedSample], order: Order, starts: Starts, offsets: Int64) -> Before:
        inputs = [(i, j) for i, m in order if m == 0 for j in range(samples[i].num_input_images)]
        runs = [self._runs(starts[i][0][j], samples[i].grids[j]) for i, j in inputs]
        ends = offsets[-1] + np.cumsum([0, *map(len, runs)], dtype=np.int64)
        of_input = {image: np.arange(ends[x], ends[x + 1]) for x, image in enumerate(inputs)}
        of_helper = {segment: np.arange(offsets[w], offsets[w + 1]) for w, segment in enumerate(order)}
        places: list[Int64] = []
        earlier: list[Int64] = []
        searches: list[Search] = []
        for w, (i, m) in enumerate(order):
            sample, mine = samples[i], of_helper[i, m]
            shown = [(sample.grids[j], of_input[i, j]) for j in range(sample.num_input_images)]
            done = [(_helper(sample, n), of_helper[i, n]) for n in range(m)]
            at_place = done[-1:] or shown if self.compare == "place" else []
            same = [rows for grid, rows in at_place if grid == _helper(sample, m)]
            if not same and (pictures := [rows for _, rows in shown + done]):
                first = searches[-1].stop if searches else 0
                stop = first + sum(map(len, pictures))
                searches.append(Search(int(offsets[w]), int(offsets[w + 1]), first, stop))
                earlier += pictures
            places.append(np.stack(same or [mine], axis=1))
        rows, weights = _table(runs)
        return Before(
            input_rows=rows,
            input_weights=weights,
            place=torch.from_numpy(_stack(places)),
            earlier=torch.from_numpy(np.concatenate([np.empty(0, dtype=np.int64), *earlier])),
            searches=tuple(searches),
        )

    def _in_region(self, samples: list[EncodedSample], order: Order) -> torch.Tensor | None:
        """[N] bool; None where a segment has no region (a run that selects by them does not begin then)."""
        parts: list[Bool] = []
        for i, m in order:
            region = samples[i].regions[m]
            if region is None:
                return None
            rows, columns = self._merged(_helper(samples[i], m))
            patches = _cells(region[1], region[3], rows)[:, None] & _cells(region[0], region[2], columns)
            run, kept = max(1, rows * columns // self.group_size), min(rows * columns, self.group_size)
            inside = np.zeros(kept, dtype=bool)
            inside[np.minimum(np.flatnonzero(patches) // run, kept - 1)] = True  # the dropped rest: the last candidate
            parts.append(inside)
        return torch.from_numpy(np.concatenate([np.empty(0, dtype=bool), *parts]))


def _helper(sample: EncodedSample, m: int) -> Grid:
    return sample.grids[sample.num_input_images + m]


def _cells(low: float, high: float, count: int) -> Bool:
    """[count]: which cells along a side have their middle in [low, high]; if none has, the cell around the middle of
    that stretch."""
    middles = (np.arange(count) + 0.5) / count
    inside = (middles >= low) & (middles <= high)
    if not inside.any():
        inside[min(int((low + high) / 2 * count), count - 1)] = True
    return inside


def _table(runs: list[Int64]) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs as one rectangle of feature rows [N, R] int64 and weights [N, R] float32, 0 where a run is shorter."""
    shape = sum(map(len, runs)), max((run.shape[1] for run in runs), default=1)
    rows, weights = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.float32)
    first = 0
    for run in runs:
        count, length = run.shape
        rows[first : first + count, :length] = run
        weights[first : first + count, :length] = 1 / length
        first += count
    return torch.from_numpy(rows), torch.from_numpy(weights)


def _stack(tables: list[Int64]) -> Int64:
    """Tables on top of each other, as wide as the widest; the last column of the others is repeated."""
    stacked = np.empty((sum(map(len, tables)), max((table.shape[1] for table in tables), default=1)), dtype=np.int64)
    first = 0
    for table in tables:
        count, width = table.shape
        stacked[first : first + count, :width] = table
        stacked[first : first + count, width:] = table[:, -1:]
        first += count
    return stacked
