"""The plan: nothing twice, nothing lost but the remainder, the same for every world size, quick at any step."""

import pickle
import time
from collections import Counter

import numpy as np
import pytest

from ilvr_ds.data.mixture_plan import Plan
from ilvr_ds.data.plan import SamplePlan
from ilvr_ds.errors import UserError

PLAN = SamplePlan(shard_sizes=(100, 7, 250, 1, 93), seed=3, lanes=8, global_batch=16, shuffle_buffer=10)


def epoch_samples(plan: SamplePlan, epoch: int) -> np.ndarray:
    steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
    return np.concatenate([plan.samples(step, 0, 1) for step in steps])


@pytest.mark.parametrize("buffer", [1, 10, 16, 100_000])
@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_every_sample_at_most_once_an_epoch_and_only_the_remainder_left_out(buffer, epoch):
    plan = SamplePlan(PLAN.shard_sizes, 3, 8, 16, buffer)
    samples = epoch_samples(plan, epoch)
    assert (plan.num_samples, plan.steps_per_epoch, plan.remainder) == (451, 28, 3)
    assert len(samples) == len(set(samples.tolist())) == 448
    assert samples.dtype == np.int64 and samples.min() >= 0 and samples.max() < 451


def test_the_same_samples_at_every_world_size():
    check_world_sizes(PLAN)


def check_world_sizes(plan: Plan) -> None:
    """Of a global batch of 16."""
    for step in (0, 1, 27, 28, 1000):
        whole = plan.samples(step, 0, 1)
        for world in (1, 2, 4, 8):
            shares = [plan.samples(step, rank, world) for rank in range(world)]
            assert {len(share) for share in shares} == {16 // world}
            assert Counter(np.concatenate(shares).tolist()) == Counter(whole.tolist())


def test_a_rank_takes_its_lanes_in_order():
    lanes = PLAN.samples(5, 0, 1).reshape(8, 2)
    assert (PLAN.samples(5, 1, 4).reshape(2, 2) == lanes[1::4]).all()


def test_steps_are_a_function_of_their_number_alone():
    forward = [PLAN.samples(step, 1, 2).tolist() for step in range(60)]
    fresh = SamplePlan(PLAN.shard_sizes, 3, 8, 16, 10)
    assert [fresh.samples(step, 1, 2).tolist() for step in reversed(range(60))] == forward[::-1]
    assert pickle.loads(pickle.dumps(PLAN)) == PLAN


def test_epochs_and_seeds_differ_in_order_and_in_what_they_leave_out():
    orders = [epoch_samples(PLAN, epoch).tolist() for epoch in range(4)]
    orders += [epoch_samples(SamplePlan(PLAN.shard_sizes, 4, 8, 16, 10), 0).tolist()]
    assert len({tuple(order) for order in orders}) == 5
    left_out = {tuple(sorted(set(range(451)) - set(order))) for order in orders}
    assert len(left_out) > 1, "the same samples would never be seen"


@pytest.mark.parametrize("shards", [(63,), (40, 23)])
def test_every_sample_is_seen_in_some_epoch(shards: tuple[int, ...]) -> None:
    """Most data sets are one shard: catches a remainder that is always the same end of it."""
    plan = SamplePlan(shards, seed=3, lanes=8, global_batch=32)
    epochs = [epoch_samples(plan, epoch) for epoch in range(20)]
    assert {len(set(samples.tolist())) for samples in epochs} == {32}
    assert set(np.concatenate(epochs).tolist()) == set(range(63))
    assert max(Counter(np.concatenate(epochs).tolist()).values()) < 18, "some samples would be seen twice as often"


def test_a_lane_is_shuffled_within_buffers_and_not_beyond():
    plan = SamplePlan((1000,), 0, 1, 10, shuffle_buffer=100)
    samples = epoch_samples(plan, 0)
    for start in range(0, 1000, 100):
        buffer = samples[start : start + 100]
        assert sorted(buffer) == list(range(start, start + 100))
        assert (np.diff(buffer) == 1).mean() < 0.2


def test_buffers_that_a_step_straddles():
    plan = SamplePlan((64,), 1, 2, 24, shuffle_buffer=5)
    samples = epoch_samples(plan, 0)
    assert len(set(samples.tolist())) == 48


def test_the_order_is_pinned():
    """Resuming with another release of numpy or ilvr_ds must go on in the same order."""
    whole, rest = (SamplePlan(shards, 7, 2, 4, 3) for shards in ((6, 5, 5), (6, 5, 4)))
    assert [whole.samples(step, 0, 1).tolist() for step in range(4)] == [
        [8, 7, 14, 0],
        [6, 11, 15, 3],
        [10, 9, 2, 1],
        [12, 13, 4, 5],
    ]
    assert [rest.samples(step, 0, 1).tolist() for step in range(4)] == [
        [8, 7, 12, 14],
        [6, 11, 13, 2],
        [10, 9, 1, 0],
        [6, 7, 1, 0],
    ]


def test_a_late_step_is_as_quick_as_the_first_and_five_million_samples_start_in_a_second():
    start = time.perf_counter()
    plan = SamplePlan((1000,) * 5000, 1, 64, 512)
    plan.samples(0, 0, 8)
    assert time.perf_counter() - start < 1
    times = {}
    for step in (0, 10**6):
        start = time.perf_counter()
        plan.samples(step + 8, 3, 8)
        times[step] = time.perf_counter() - start
    assert times[10**6] < 0.25 + 5 * times[0]


@pytest.mark.parametrize(
    ("lanes", "batch", "parts"),
    [
        (8, 12, ["data.lanes: 8", "of 12", "data.lanes: 6 or 12", "batch: 8 or 16"]),
        (16, 4, ["data.lanes: 4", "batch: 16", "train.micro_batch_size", "train.grad_accum_steps"]),
    ],
)
def test_lanes_must_divide_the_global_batch(lanes, batch, parts):
    with pytest.raises(UserError) as error:
        SamplePlan((100,), 0, lanes, batch)
    assert all(part in str(error.value) for part in parts), error.value


def test_world_must_divide_the_lanes():
    plan = SamplePlan((100,), 0, 8, 24)
    with pytest.raises(UserError, match=r"8 lanes .* 3 ranks; nearest valid data.lanes: 6 or 12; .* ranks: 2 or 4"):
        plan.samples(0, 0, 3)
    with pytest.raises(UserError, match=r"none, because 5 does not divide .*train.grad_accum_steps.* 24 either"):
        plan.check_world(5)


def test_too_few_samples_for_one_step():
    with pytest.raises(UserError, match=r"data.shards: 15 samples do not fill .* 16 samples"):
        SamplePlan((10, 5), 0, 8, 16)
    assert SamplePlan((10, 6), 0, 8, 16).steps_per_epoch == 1
