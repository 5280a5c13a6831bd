"""Sums of metrics over steps and ranks, kept on the device until they are logged."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ilvr_ds import dist


class MetricSums:
    """Named running sums in one float64 vector on the device; reading them is the only host synchronisation."""

    def __init__(self, names: list[str], device: torch.device) -> None:
        self.names = names
        self.values = torch.zeros(len(names), dtype=torch.float64, device=device)

    def add(self, parts: Mapping[str, Tensor]) -> None:
        """Add 0-dimensional device tensors; names that are not in `parts` keep their sums."""
        zero = torch.zeros((), dtype=torch.float64, device=self.values.device)
        self.values += torch.stack([parts[name].double() if name in parts else zero for name in self.names])

    def take(self) -> dict[str, float]:
        """Sums over all ranks since the last call, as numbers (collective, an all-reduce); starts again from zero."""
        totals = dist.sum_over_ranks(self.values.clone()).tolist()
        self.values.zero_()
        return dict(zip(self.names, totals, strict=True))


def means(parts: dict[str, tuple[float, float]]) -> dict[str, float]:
    """Means by name, from sums and how much they are of; none where there was nothing to average."""
    return {name: total / count for name, (total, count) in parts.items() if count}
