"""Where the time of a step goes: marks between named phases, read when metrics are logged.

On a GPU a mark is an event in its stream: a phase lasts from when the device reaches it until the device reaches the
next, and nothing waits. What the host does while the device still has work does not count: the phase `data` is how long
the device itself waits for samples. On the CPU a mark is a reading of the clock.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, TypeVar

import torch

Item = TypeVar("Item")
OTHER = "other"
PHASES = (
    "data", "vision", "teacher", "selection", "forward", "backward", "optimizer", "momentum", "checkpoint", OTHER,
)  # fmt: skip
"""What the time of training is divided into."""
AWAY = ("evaluation", "pictures")
"""Not training: neither these nor phases within them count."""


class PhaseTimer:
    """Seconds of named phases. Within a phase another may begin: its time is then its own alone."""

    def __init__(self, device: torch.device) -> None:
        self.is_cuda = device.type == "cuda"
        self.start()

    def start(self) -> None:
        """Begin anew: what was before is forgotten."""
        self._name = OTHER
        self._marks: list[tuple[str, Any]] = [(OTHER, self._now())]

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """A phase."""
        before = self._name
        if before in AWAY:
            yield
            return
        self._enter(name)
        try:
            yield
        finally:
            self._enter(before)

    def around(self, name: str, items: Iterable[Item]) -> Iterator[Item]:
        """`items`; the time until each is there is a phase."""
        iterator = iter(items)
        while True:
            with self(name):
                item = next(iterator, None)
            if item is None:
                return
            yield item

    def take(self) -> dict[str, float]:
        """Seconds of each phase since the last call; on a GPU this waits for the device."""
        self._enter(self._name)
        marks, self._marks = self._marks, self._marks[-1:]
        if self.is_cuda:
            marks[-1][1].synchronize()
        seconds: dict[str, float] = {}
        for (name, start), (_, stop) in pairwise(marks):
            seconds[name] = seconds.get(name, 0.0) + self._between(start, stop)
        return seconds

    def _enter(self, name: str) -> None:
        self._name = name
        self._marks.append((name, self._now()))

    def _now(self) -> Any:
        if not self.is_cuda:
            return time.perf_counter()
        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _between(self, start: Any, stop: Any) -> float:
        return float(start.elapsed_time(stop) / 1000 if self.is_cuda else stop - start)


def shares(ranks: list[Mapping[str, float]]) -> dict[str, float]:
    """`speed/share/PHASE`, means over the ranks' seconds; together they are 1. Evaluation and pictures do not count."""
    metrics = dict.fromkeys((f"speed/share/{name}" for name in PHASES), 0.0)
    for seconds in ranks:
        whole = sum(value for name, value in seconds.items() if name not in AWAY)
        for name in set(seconds) - set(AWAY):
            metrics[f"speed/share/{name}"] += seconds[name] / max(whole, 1e-9) / len(ranks)
    return metrics
