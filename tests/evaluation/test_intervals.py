from __future__ import annotations

import numpy as np
import pytest

from ilvr_ds.evaluation.intervals import effect, share_interval


def test_the_interval_is_that_of_a_plain_paired_bootstrap() -> None:
    rng = np.random.default_rng(0)
    own, other = rng.random(200) < 0.6, rng.random(200) < 0.5
    result = effect(own.tolist(), other.tolist())
    deltas = other.astype(float) - own
    means = [deltas[rng.integers(0, 200, 200)].mean() for _ in range(4000)]
    assert result.accuracy == other.mean() and result.difference == pytest.approx(deltas.mean())
    assert [result.low, result.high] == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.02)


def test_equal_verdicts_leave_room_for_a_difference() -> None:
    """Catches an interval without a width, as a bootstrap of equal pairs has it: 20 samples do not show that much."""
    result = effect([True, False] * 10, [True, False] * 10)
    assert (result.accuracy, result.difference) == (0.5, 0.0)
    assert result.low < -0.02 and result.high > 0.02


def test_the_interval_is_newcombes() -> None:
    """His example of 50 pairs: 36 right both times, 12 the first time alone, 2 the second; method 10 of his table."""
    result = effect([True] * 36 + [False] * 12 + [True] * 2, [True] * 36 + [True] * 12 + [False] * 2)
    assert [result.low, result.high] == pytest.approx([0.0569, 0.3404], abs=1e-4)


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"), [(0, 4, 0, 0.4899), (50, 100, 0.4038, 0.5962), (4, 4, 0.5101, 1)]
)
def test_the_interval_of_a_share(hits: int, count: int, low: float, high: float) -> None:
    """Against Wilson's formula by hand: 0 of 4 is not certain, half of 100 is what the normal one says."""
    assert share_interval(hits, count) == pytest.approx((low, high), abs=1e-4)
