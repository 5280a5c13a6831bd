"""What so many samples could have shown, and intervals of means."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ilvr_ds.evaluation.intervals import Z95

Z80 = 0.841621


def smallest_effect(samples: int, discordant: int) -> float:
    """The smallest difference of paired accuracies that 80 of 100 such audits would see at 95 %.

    discordant: samples whose verdicts differ. The variance of a paired difference d is (q - d^2) / n, where the share q
    of discordant pairs, seen as (discordant + 2) / (n + 4) so that none seen is not none there, can be no less than d
    (Connor 1987, Biometrics 43, 207).
    """
    share, z = (discordant + 2) / (samples + 4), (Z95 + Z80) ** 2
    effect = math.sqrt(z * share / (samples + z))
    return effect if effect <= share else z / (samples + z)


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean of independent values and its 95 % interval by their standard deviation; (nan, nan, nan) of none."""
    n = len(values)
    if not n:
        return math.nan, math.nan, math.nan
    mean = sum(values) / n
    half = Z95 * math.sqrt(sum((value - mean) ** 2 for value in values) / max(1, n - 1) / n)
    return mean, mean - half, mean + half
