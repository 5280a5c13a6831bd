"""The best evaluation of a run so far: which checkpoint to keep, and when further training is no use."""

from __future__ import annotations

import math
from typing import Any

from ilvr_ds.errors import UserError

NONE = "none"


class Best:
    """Compares evaluations by one metric, the same on all ranks.

    metric: `checkpoint.keep_best`; patience: `train.patience`, evaluations without a better one after which the run is
    over, 0 for never.
    """

    def __init__(self, metric: str = NONE, patience: int = 0) -> None:
        self.metric = metric
        self.patience = patience
        self.found: dict[str, Any] | None = None
        """Metric, value and step of the best evaluation, as `best.json` has them"""
        self.since = 0
        """Evaluations after it"""

    def add(self, step: int, metrics: dict[str, float]) -> bool:
        """Whether the evaluation after `step` optimizer steps is the best so far. Raises UserError where it lacks the
        metric."""
        if self.metric == NONE:
            return False
        if self.metric not in metrics:
            raise UserError(
                f"checkpoint.keep_best is {self.metric}, which this evaluation lacks: no sample has an answer"
            )
        value = metrics[self.metric]
        if not math.isfinite(value) or not self._is_better(value, self.found):
            self.since += 1
            return False
        self.found, self.since = {"metric": self.metric, "value": value, "step": step}, 0
        return True

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
        return {"found": self.found, "since": self.since}

    def load(self, state: dict[str, Any] | None, on_disk: dict[str, Any] | None, done: int) -> None:
        """Go on after `done` steps from a checkpoint's state, which may be older than what `best.json` says: the last
        evaluation comes after the last checkpoint."""
        state = state or {}
        for found, since in ((state.get("found"), state.get("since", 0)), (on_disk, 0)):
            is_ours = found is not None and found["metric"] == self.metric and found["step"] <= done
            if found is not None and is_ours and self._is_better(found["value"], self.found):
                self.found, self.since = found, since

    def _is_better(self, value: float, found: dict[str, Any] | None) -> bool:
        if found is None:
            return True
        return bool(value < found["value"] if self.metric == "eval/ce" else value > found["value"])
