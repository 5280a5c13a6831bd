"""The best evaluation of a run so far: which checkpoint to keep, and when further training is no use."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from ilvr_ds import dist
from ilvr_ds.errors import UserError

NONE = "none"


class Best:
    """Compares evaluations by one metric, the same on all ranks.

    metric: `checkpoint.keep_best`; patience: `train.patience`, evaluations without a better one after which the run is
    over, 0 for never. samples: what is evaluated on; values on other samples are not compared.
    """

    def __init__(self, metric: str = NONE, patience: int = 0, samples: str = "") -> None:
        self.metric = metric
        self.patience = patience
        self.samples = samples
        self.last = 0
        """Step of the last evaluation"""
        self.found: dict[str, Any] | None = None
        """Metric, value, step and samples of the best evaluation, as `best.json` has them"""
        self.since = 0
        """Evaluations after it"""

    def add(self, step: int, metrics: dict[str, float]) -> bool:
        """Whether the evaluation after `step` optimizer steps is the best so far. Raises UserError where it lacks the
        metric."""
        if self.metric == NONE:
            return False
        if self.metric not in metrics:
            why = "no held-out sample could be used" if self.metric == "eval/ce" else "no sample has an answer"
            raise UserError(f"checkpoint.keep_best is {self.metric}, which this evaluation lacks: {why}")
        self.last = step
        value = metrics[self.metric]
        if not math.isfinite(value) or not self._is_better(value, self.found):
            self.since += 1
            return False
        about = {"samples": self.samples} if self.samples else {}
        self.found, self.since = {"metric": self.metric, "value": value, "step": step, **about}, 0
        return True

    def lose(self, on_disk: dict[str, Any] | None) -> None:
        """The best evaluation has no checkpoint, it could not be written or is deleted: what `best.json` says is the
        best again, and patience begins anew."""
        self.found, self.since = None, 0
        self._take_over(self.last, on_disk, 0)

    @property
    def is_over(self) -> bool:
        """Whether the run has waited long enough for a better evaluation."""
        return 0 < self.patience <= self.since

    def summary(self) -> str | None:
        """The best evaluation in words, if there is one."""
        if self.found is None:
            return None
        return f"best {self.metric} {self.found['value']:.4f}, after step {self.found['step']}"

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint; must be JSON."""
        about = {"metric": self.metric, "samples": self.samples}
        return {"found": self.found, "since": self.since, "last": self.last, **about}

    def load(
        self,
        state: dict[str, Any] | None,
        on_disk: dict[str, Any] | None,
        done: int,
        recorded: Iterable[tuple[int, dict[str, float]]] = (),
    ) -> None:
        """Go on after `done` steps from a checkpoint's state, which may be older than what `best.json` says, and what
        is recorded, steps and metrics in order: the last evaluation comes after the last checkpoint."""
        state = state or {}
        if self.metric != NONE and state.get("samples", self.samples) != self.samples:
            dist.warn("evaluations are on other samples than before: %s begins anew as the best of them", self.metric)
            self.last = done  # those before must not count after the next start either
            return
        # of a metric that was not looked for then, no checkpoint was kept: what is recorded of it does not count
        self.last = state["last"] if state.get("metric") == self.metric else done
        self._take_over(done, state.get("found"), state.get("since", 0))
        for step, metrics in recorded:
            if self.last < step <= done and self.metric in metrics:
                self.add(step, metrics)
        self._take_over(done, on_disk, 0)

    def _take_over(self, done: int, found: dict[str, Any] | None, since: int) -> None:
        """What an earlier start found, where it is of this run up to here, and better."""
        if found is None or found["metric"] != self.metric or found["step"] > done:
            return
        if found.get("samples", self.samples) != self.samples:
            return
        if self._is_better(found["value"], self.found):
            self.found, self.since = found, since

    def _is_better(self, value: float, found: dict[str, Any] | None) -> bool:
        if found is None:
            return True
        return bool(value < found["value"] if self.metric == "eval/ce" else value > found["value"])
