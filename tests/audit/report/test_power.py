"""Simulated audits: intervals cover what they should, and what is said to be seen is seen."""

from __future__ import annotations

import numpy as np
import pytest

from ilvr_ds.audit.report.power import mean_interval, smallest_effect
from ilvr_ds.evaluation.intervals import effect


def draw(rng: np.random.Generator, samples: int, lost: float, gained: float) -> tuple[list[bool], list[bool]]:
    """Verdicts with own latents and with others: a share is right with own alone, a share with others alone."""
    kind = rng.choice(4, samples, p=[0.4, lost, gained, 0.6 - lost - gained])
    return (kind <= 1).tolist(), ((kind == 0) | (kind == 2)).tolist()


@pytest.mark.parametrize(
    ("samples", "lost", "gained"),
    [(500, 0.05, 0.05), (200, 0.1, 0.1), (500, 0.25, 0.05), (200, 0.1, 0.02), (1000, 0.04, 0.02)],
    ids=["null", "null of 200", "20 points", "8 points of 200", "2 points of 1,000"],
)
def test_intervals_of_a_thousand_audits_cover(samples: int, lost: float, gained: float) -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(1000):
        found = effect(*draw(rng, samples, lost, gained))
        hits += found.low <= gained - lost <= found.high
    assert 930 <= hits <= 970, hits


@pytest.mark.parametrize(("samples", "noise"), [(200, 0.03), (800, 0.03), (800, 0.0)])
def test_the_smallest_effect_is_seen_in_four_of_five_audits(samples: int, noise: float) -> None:
    """noise: a share of verdicts that differs each way for no reason."""
    rng = np.random.default_rng(1)
    least = smallest_effect(samples, round(2 * noise * samples))
    lost = (2 * noise + least) / 2 if 2 * noise > least else least
    seen = sum(effect(*draw(rng, samples, lost, lost - least)).high < 0 for _ in range(1000))
    assert 760 <= seen <= 930, "80 %, and rather more than fewer where little was seen to differ"


def test_fewer_samples_see_less() -> None:
    assert smallest_effect(100, 5) > smallest_effect(400, 20) > smallest_effect(1600, 80) > 0
    assert smallest_effect(1600, 0) > 0.003, "no verdict that differed is not certainty that none does"


def test_interval_of_a_mean() -> None:
    mean, low, high = mean_interval([1.0, 2.0, 3.0, 4.0])
    assert mean == 2.5 and high - mean == pytest.approx(mean - low)
    assert high - mean == pytest.approx(1.959964 * np.std([1, 2, 3, 4], ddof=1) / 2)


def test_one_value_has_a_mean_whose_interval_is_unknown() -> None:
    """Catches an interval of width 0: certainty from one sample."""
    assert mean_interval([2.0]) == (2.0, None, None)
