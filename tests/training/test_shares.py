"""What is said of a mixture at the start and the end of a run."""

from __future__ import annotations

from ilvr_ds.data.mixture_plan import MixturePlan
from ilvr_ds.data.plan import SamplePlan
from ilvr_ds.training.shares import seen_by_set, share_lines

PLAN = MixturePlan(((100,), (10,)), (1, 1), 110, 0, 2, 10)


def test_samples_and_passes_are_counted_by_set() -> None:
    assert seen_by_set(PLAN, ("big", "small"), 10) == {
        "data/samples_by_set/big": 50.0, "data/epochs_by_set/big": 0.5,
        "data/samples_by_set/small": 50.0, "data/epochs_by_set/small": 5.0,
    }  # fmt: skip


def test_what_is_never_seen_and_how_often_a_small_set_comes_is_said() -> None:
    assert list(share_lines(PLAN, ("big", "small"), 11)) == [
        "big: 55 samples in 11 steps (50.0% of the run), 0.55 passes over its 100; 45 are never seen",
        "small: 55 samples in 11 steps (50.0% of the run), 5.5 passes over its 10",
    ]


def test_nothing_is_said_of_one_data_set() -> None:
    plan = SamplePlan((100,), 0, 2, 10)
    assert seen_by_set(plan, (), 5) == {} and list(share_lines(plan, (), 5)) == []
