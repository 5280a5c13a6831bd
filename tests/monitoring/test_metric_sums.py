from __future__ import annotations

import torch

from ilvr_ds.monitoring.metric_sums import MetricSums, means

CPU = torch.device("cpu")


def test_sums_run_until_they_are_taken() -> None:
    totals = MetricSums(["a", "b"], CPU)
    totals.add({"a": torch.tensor(1.5), "b": torch.tensor(2)})
    totals.add({"a": torch.tensor(0.25), "b": torch.tensor(True)})
    assert totals.take() == {"a": 1.75, "b": 3.0}
    assert totals.take() == {"a": 0.0, "b": 0.0}


def test_names_that_are_not_given_stay_as_they_are() -> None:
    totals = MetricSums(["a", "b"], CPU)
    totals.add({"b": torch.tensor(1.0)})
    totals.add({"a": torch.tensor(2.0)})
    assert totals.take() == {"a": 2.0, "b": 1.0}


def test_small_parts_of_a_large_sum_are_not_lost() -> None:
    totals = MetricSums(["tokens"], CPU)
    totals.add({"tokens": torch.tensor(2.0**24)})
    for _ in range(3):
        totals.add({"tokens": torch.tensor(1.0)})
    assert totals.take() == {"tokens": 2.0**24 + 3}, "float32 would have stopped at 2^24"


def test_what_was_added_can_change_afterwards() -> None:
    totals, value = MetricSums(["a"], CPU), torch.tensor(1.0)
    totals.add({"a": value})
    value += 7
    assert totals.take() == {"a": 1.0}


def test_there_is_no_mean_of_nothing() -> None:
    """Catches a share of 0 where no sample of an interval had a segment."""
    assert means({"some": (3.0, 2.0), "zero": (0.0, 2.0), "none": (0.0, 0.0)}) == {"some": 1.5, "zero": 0.0}
