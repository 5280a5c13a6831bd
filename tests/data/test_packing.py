"""Micro-batches filled by tokens: what every rank works out for itself must fit together."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from ilvr_ds.data.packing import PackedNumbers, balanced_bins, like_bins
from ilvr_ds.data.plan import Int64, SamplePlan
from ilvr_ds.errors import UserError

LENGTHS = np.random.default_rng(0).integers(100, 1500, 640)
PLAN = SamplePlan((300, 340), seed=3, lanes=8, global_batch=64)


def share(rank: int, world: int, budget: int = 4096, has_rows: bool = False) -> PackedNumbers:
    return PackedNumbers(PLAN, rank, world, LENGTHS, budget, has_rows)


def area(lengths: Int64) -> int:
    """Tokens with a row for each sample."""
    return len(lengths) * int(lengths.max())


@pytest.mark.parametrize("budget", [1500, 2048, 4096, 100_000])
@pytest.mark.parametrize("multiple", [1, 2, 8])
@pytest.mark.parametrize(("deal", "load"), [(balanced_bins, np.sum), (like_bins, area)], ids=["tokens", "rows"])
def test_bins_share_out_everything_within_the_budget(
    deal: Callable[[Int64, int, int], list[Int64]], load: Callable[[Int64], int], budget: int, multiple: int
) -> None:
    lengths = LENGTHS[:64]
    bins = deal(lengths, budget, multiple)
    assert len(bins) % multiple == 0 and all(len(members) for members in bins)
    assert sorted(np.concatenate(bins).tolist()) == list(range(64))
    loads = [load(lengths[members]) for members in bins]
    assert max(loads) <= budget and loads == sorted(loads, reverse=True)


def test_bins_are_few_and_nearly_equal() -> None:
    """Graham's bound for one machine more or less: what the fullest has too much of is at most the shortest length."""
    bins = balanced_bins(LENGTHS[:64], 4096, 2)
    loads = np.array([int(LENGTHS[:64][members].sum()) for members in bins])
    assert len(bins) <= 2 * (-(-int(LENGTHS[:64].sum()) // (2 * 4096)) + 1)
    assert loads.max() - loads.min() <= 150


def test_lengths_that_fill_the_budget_get_a_bin_each() -> None:
    assert [members.tolist() for members in balanced_bins(np.array([9, 10, 10, 9]), 10, 2)] == [[1], [2], [0], [3]]


def test_one_long_sample_does_not_pad_the_short_ones() -> None:
    """Catches bins that are full of tokens: they have 2.4 times as many with a row each."""
    lengths = np.concatenate([[6000], np.random.default_rng(0).integers(400, 700, 63)])
    for deal, most in ((balanced_bins, 2.5), (like_bins, 1.1)):
        padded = sum(area(lengths[members]) for members in deal(lengths, 12288, 1))
        assert most - 0.2 < padded / lengths.sum() < most


def test_bins_of_like_lengths_are_few_and_as_equal_as_can_be() -> None:
    assert [members.tolist() for members in like_bins(np.array([5, 9, 5, 5, 9, 5]), 20, 1)] == [[0, 2, 3, 5], [1, 4]]
    assert [members.tolist() for members in like_bins(np.array([3, 3, 3, 3]), 100, 2)] == [[0, 1], [2, 3]]
    assert [members.tolist() for members in like_bins(np.array([9, 1, 1, 1]), 100, 4)] == [[0], [1], [2], [3]]


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_ranks_take_the_steps_samples_in_equally_many_micro_batches(world: int) -> None:
    for step in (0, 7, 12, 1000):
        ranks = [share(rank, world)(step) for rank in range(world)]
        assert len({len(micro_batches) for micro_batches in ranks}) == 1
        numbers = np.concatenate([numbers for micro_batches in ranks for numbers in micro_batches])
        assert sorted(numbers.tolist()) == sorted(PLAN.samples(step, 0, 1).tolist())
        loads = np.array([[LENGTHS[numbers].sum() for numbers in micro_batches] for micro_batches in ranks])
        assert loads.max() <= 4096
        assert (loads.max(0) - loads.min(0)).max() <= 150, "ranks wait for each other in every micro-batch"


def test_a_share_is_a_pure_function_of_the_step() -> None:
    first, again = share(1, 2)(5), share(1, 2)(5)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("world", [1, 2, 8])
def test_ranks_take_micro_batches_of_like_lengths(world: int) -> None:
    """All of a step's samples, in equally many micro-batches, each with rows that fit."""
    for step in (0, 7, 12):
        ranks = [share(rank, world, has_rows=True)(step) for rank in range(world)]
        assert len({len(micro_batches) for micro_batches in ranks}) == 1
        batches = [numbers for micro_batches in ranks for numbers in micro_batches]
        assert sorted(np.concatenate(batches).tolist()) == sorted(PLAN.samples(step, 0, 1).tolist())
        assert max(area(LENGTHS[numbers]) for numbers in batches) <= 4096


def test_a_budget_below_the_longest_sample_is_a_mistake() -> None:
    with pytest.raises(UserError, match=rf"micro_batch_tokens is 1000, but the longest sample has {LENGTHS.max()}"):
        share(0, 1, budget=1000)
