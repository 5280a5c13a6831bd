"""Weights cut like ZeRO-1 and 2 cut them become slices as ZeRO-3 cuts them; what no layout can be is refused."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch

from ilvr_ds import dist
from ilvr_ds.engine.even_slices import EvenSlices, _groups
from ilvr_ds.engine.networks import init_process_group
from tests.ranks import run_ranks

LENGTHS = (5, 1, 16, 2, 40, 7)
"""Of weights: some smaller than there are ranks, and one that goes alone."""


def exchanged_on_ranks(group: int) -> dict[str, list[list[float]]]:
    init_process_group()
    assert dist.world_size() == 3
    return exchanged(group)


def exchanged(group: int) -> dict[str, list[list[float]]]:
    """On a rank: all weights in one run, cut into unequal shares, as slices; and what these should be."""
    world, rank = dist.world_size(), dist.rank()
    dense = [torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in LENGTHS]
    ends = [0, 11, 30, sum(LENGTHS)] if world == 3 else [0, sum(LENGTHS)]
    first, last = ends[rank], ends[rank + 1]
    runs, start = [], 0
    for n in LENGTHS:
        run = (max(first - start, 0), min(last - start, n))
        runs.append(run if run[0] < run[1] else (0, 0))
        start += n
    sizes = [-(-n // world) for n in LENGTHS]
    parts = [weight[slice(*run)] for weight, run in zip(dense, runs, strict=True)]
    padded = [torch.cat([w, w.new_zeros(s * world - len(w))]) for w, s in zip(dense, sizes, strict=True)]
    with mock.patch("ilvr_ds.engine.even_slices.GROUP", group):
        slices = EvenSlices(runs, sizes)
    return {
        "slices": [s.tolist() for _ in range(2) for s in slices.of(parts, torch.device("cpu"))],
        "expected": [w.view(world, -1)[rank].tolist() for w in padded] * 2,
    }


@pytest.mark.parametrize("group", [8, 20, 1000])
def test_slices_of_weights_that_end_anywhere(group: int, tmp_path: Path) -> None:
    """Catches pieces that arrive out of order, a rank that has nothing of a weight, and padding left out."""
    for result in run_ranks("tests.engine.test_even_slices:exchanged_on_ranks", 3, tmp_path, group=group):
        assert result["slices"] == result["expected"]


def test_on_one_rank_nothing_is_copied() -> None:
    result = exchanged(1000)
    assert result["slices"] == result["expected"]
    part = torch.ones(4)
    (found,) = EvenSlices([(0, 4)], [4]).of([part], part.device)
    assert found.data_ptr() == part.data_ptr()


@mock.patch("ilvr_ds.engine.even_slices.GROUP", 10)
def test_groups_are_neighbours_up_to_a_size_or_alone() -> None:
    assert _groups([4, 6, 1, 30, 9, 2]) == [range(0, 2), range(2, 3), range(3, 4), range(4, 5), range(5, 6)]
    assert _groups([]) == []


@pytest.mark.parametrize(
    ("run", "size", "message"),
    [((1, 4), 4, "element 0 lies on no rank"), ((0, 6), 4, "weight 0 has 6 elements on all ranks, its slices only 4")],
)
def test_a_layout_that_cannot_be_is_refused(run: tuple[int, int], size: int, message: str) -> None:
    """Catches a release of DeepSpeed that cuts otherwise: the teacher would follow something else."""
    with pytest.raises(RuntimeError, match=message):
        EvenSlices([run], [size])
