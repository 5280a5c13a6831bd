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


def mean_interval(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Mean of independent values, one or more, and the ends of its 95 % interval by their standard deviation.

    The ends are None for one value, which says nothing of how values differ.
    """
    n = len(values)
    mean = sum(values) / n
    if n == 1:
        return mean, None, None
    half = Z95 * math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1) / n)
    return mean, mean - half, mean + half
