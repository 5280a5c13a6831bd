"""The plan of a mixture: exact shares, every sample of a set once a pass, the same for every world size, pure."""

from __future__ import annotations

import pickle
import random
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from ilvr_ds.config import DataSetConfig
from ilvr_ds.data.mixture_plan import MixturePlan, divided, rates_of
from ilvr_ds.errors import UserError
from tests.data.test_plan import check_world_sizes

SIZES = (451, 90, 17)
PLAN = MixturePlan(((100, 7, 250, 1, 93), (50, 40), (17,)), (4, 2, 1), sum(SIZES), 3, 8, 16, 10)
"""Weights of 4 to 2 to 1: the first set is not seen whole, the third often."""


def drawn(plan: MixturePlan, steps: range) -> np.ndarray:
    return np.concatenate([plan.samples(step, 0, 1) for step in steps])


def of_sets(samples: np.ndarray) -> list[np.ndarray]:
    """The samples of each set, numbered there, in the order in which they came."""
    starts = np.cumsum((0, *SIZES))
    return [samples[(samples >= a) & (samples < b)] - a for a, b in pairwise(starts)]


def test_each_step_has_the_share_of_each_set_and_what_is_counted_is_what_comes() -> None:
    for step in range(200):
        counts = [len(found) for found in of_sets(PLAN.samples(step, 0, 1))]
        before, after = PLAN.taken(step), PLAN.taken(step + 1)
        assert counts == [b - a for a, b in zip(before, after, strict=True)]
        assert all(abs(n - 16 * rate / 7) <= 1.5 for n, rate in zip(counts, PLAN.rates, strict=True))
    assert PLAN.taken(7 * 100) == (6400, 3200, 1600)


def test_a_set_comes_whole_before_any_of_its_samples_comes_again() -> None:
    """Across steps and the mixture's epochs: nothing of a set is cut off, whatever its size."""
    for steps in (1, 5, 28, 29, 57, 120):
        for found, size in zip(of_sets(drawn(PLAN, range(steps))), SIZES, strict=True):
            times = np.bincount(found, minlength=size)
            assert len(times) == size and times.max() - times.min() <= 1, (steps, size)
    assert [int(n) for n in np.array(PLAN.taken(120)) // SIZES] == [2, 6, 16]


def test_epochs_of_sets_give_that_many_passes() -> None:
    entries = [DataSetConfig("a", epochs=1.0), DataSetConfig("b", epochs=2.5), DataSetConfig("c", epochs=4.0)]
    rates, samples = rates_of(entries, (400, 64, 20))
    assert samples == 400 + 160 + 80 == 640
    plan = MixturePlan(((400,), (64,), (20,)), rates, samples, 0, 4, 16)
    assert (plan.steps_per_epoch, plan.remainder) == (40, 0)
    assert plan.taken(40) == (400, 160, 80) and plan.taken(80) == (800, 320, 160)


def test_weights_count_as_written_and_an_epoch_has_as_many_samples_as_all_sets() -> None:
    entries = [DataSetConfig("a", weight=0.1), DataSetConfig("b", weight=0.2)]
    assert rates_of(entries, (7, 1000)) == ((1, 2), 1007)
    assert rates_of([replace(entry, weight=10 * (entry.weight or 0)) for entry in entries], (7, 1000))[0] == (1, 2)


def test_the_same_samples_at_every_world_size() -> None:
    check_world_sizes(PLAN)


def test_no_rank_is_given_one_set_for_good() -> None:
    """Catches sets that are dealt in turn: of two, rank 0 would always have the one with the longer samples."""
    plan = MixturePlan(((100,), (100,)), (1, 1), 200, 0, 2, 2)
    first = [plan.samples(step, 0, 2)[0] < 100 for step in range(100)]
    assert 25 < sum(first) < 75


def test_steps_are_a_function_of_seed_and_number_alone() -> None:
    forward = [PLAN.samples(step, 1, 2).tolist() for step in range(60)]
    fresh = pickle.loads(pickle.dumps(replace(PLAN)))
    assert [fresh.samples(step, 1, 2).tolist() for step in reversed(range(60))] == forward[::-1]
    assert [replace(PLAN, seed=4).samples(step, 1, 2).tolist() for step in range(60)] != forward


def test_the_order_is_pinned() -> None:
    """Resuming with another release of numpy or ilvr_ds must go on in the same order."""
    plan = MixturePlan(((3, 4), (2,)), (2, 1), 9, 7, 2, 4, 2)
    assert [plan.samples(step, 0, 1).tolist() for step in range(4)] == PINNED


PINNED = [[3, 7, 1, 2], [4, 8, 0, 8], [3, 6, 5, 7], [6, 8, 4, 5]]


@pytest.mark.parametrize("seed", range(200))
def test_shares_add_up_stay_near_the_exact_ones_and_never_fall(seed: int) -> None:
    """Catches rounded shares, which add up to another number, and largest remainders, which fall as the total grows."""
    chance = random.Random(seed)
    rates = [chance.choice([1, 2, 3, 17, 100, 999, 10**6]) for _ in range(chance.randint(1, 8))]
    total, more = chance.choice([chance.randrange(100), chance.randrange(10**9)]), chance.randrange(100)
    first, later = divided(total, tuple(rates)), divided(total + more, tuple(rates))
    assert sum(first) == total and sum(later) == total + more
    assert all(b >= a >= 0 for a, b in zip(first, later, strict=True))
    exact = [total * rate / sum(rates) for rate in rates]
    assert all(abs(a - b) <= max(1, len(rates) / 2) for a, b in zip(first, exact, strict=True))


def test_what_does_not_fit_is_refused_like_for_one_set() -> None:
    with pytest.raises(UserError, match=r"data.lanes: 8 does not divide .* 12; nearest valid data.lanes: 6 or 12"):
        replace(PLAN, global_batch=12)
    with pytest.raises(UserError, match=r"data.shards: 15 samples do not fill .* 16 samples"):
        replace(PLAN, epoch_samples=15)
    with pytest.raises(UserError, match=r"8 lanes cannot be shared by 3 ranks"):
        PLAN.samples(0, 0, 3)
