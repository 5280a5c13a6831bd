"""Shares of right answers and their differences, with 95 % intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Z95 = 1.959964


@dataclass(frozen=True)
class Effect:
    """An accuracy, and its difference to that of something else on the same samples."""

    accuracy: float
    difference: float
    low: float
    high: float

    def to_dict(self) -> dict[str, Any]:
        """The numbers; `interval_95` is the confidence interval of the difference."""
        return {
            "accuracy": self.accuracy,
            "difference": self.difference,
            "interval_95": [self.low, self.high],
        }


def effect(own: Sequence[bool], other: Sequence[bool]) -> Effect:
    """Compare the verdicts `other` with `own`, on the same samples in the same order.

    The 95 % interval of the difference is Newcombe's for paired proportions (1998, Statistics in Medicine 17, 2635,
    method 10): it has a width where all verdicts agree, too, which a bootstrap has not.
    """
    n = len(own)
    both = sum(a and b for a, b in zip(own, other, strict=True))
    first, second = sum(own), sum(other)
    p, q = second / n, first / n
    phi = _correlation(both, first, second, n)
    (p_low, p_high), (q_low, q_high) = share_interval(second, n), share_interval(first, n)

    def distance(a: float, b: float) -> float:
        return math.sqrt(max(0.0, a * a - 2 * phi * a * b + b * b))

    low = p - q - distance(p - p_low, q_high - q)
    high = p - q + distance(p_high - p, q - q_low)
    return Effect(p, p - q, low, high)


def share_interval(hits: float, count: float) -> tuple[float, float]:
    """Wilson's 95 % interval (1927) of a share that was seen as `hits` of `count`."""
    share, spread = hits / count, Z95**2 / count
    middle = (share + spread / 2) / (1 + spread)
    half = Z95 / (1 + spread) * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def _correlation(both: int, first: int, second: int, n: int) -> float:
    """Of paired verdicts, with Newcombe's correction towards 0 where it is positive; 0 where one is constant."""
    product = first * (n - first) * second * (n - second)
    if product == 0:
        return 0.0
    excess = both * (n - first - second + both) - (first - both) * (second - both)
    corrected = max(excess - n / 2, 0.0) if excess > 0 else float(excess)
    return corrected / math.sqrt(product)
