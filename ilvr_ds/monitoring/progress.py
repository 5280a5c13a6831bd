"""What a run shows of its progress: a bar on a terminal, else lines in the log."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

logger = logging.getLogger("ilvr_ds")
_SHOWN = {
    "loss/total": ("loss", "{:.4f}"),
    "loss/ce": ("ce", "{:.4f}"),
    "loss/alignment": ("align", "{:.4f}"),
    "loss/contrastive": ("contrast", "{:.4f}"),
    "lr": ("lr", "{:.2e}"),
    "grad/norm": ("grad", "{:.3g}"),
    "epoch": ("epoch", "{:.2f}"),
    "speed/tokens_per_s": ("tok/s", "{:.0f}"),
    "speed/mfu": ("MFU", "{:.1%}"),
}
"""Metrics of the step line, in its order; what a stage or a device does not have is left out."""
_UNITS = {"tok/s": "tokens/s", "GiB": "GiB"}
"""Names that stand behind their number in a line."""


class Progress:
    """A bar on a terminal, else a plain line per log interval; only on the main rank."""

    def __init__(self, total_steps: int, is_main: bool) -> None:
        self.total = total_steps
        self.is_main = is_main
        self._bar: Any = None
        self._while_bar = ExitStack()
        self._first: tuple[int, float] | None = None

    def begin(self, done: int) -> None:
        """Begin after `done` steps of an earlier start, which do not count for the time left."""
        if self.is_main and sys.stderr.isatty():
            self._bar = tqdm(total=self.total, initial=done, unit="step", dynamic_ncols=True)
            self._while_bar.enter_context(logging_redirect_tqdm([logger]))  # lines go above the bar

    def update(self, done: int, metrics: Mapping[str, float]) -> None:
        """Show the state after `done` steps."""
        if not self.is_main:
            return
        shown = {short: form.format(metrics[name]) for name, (short, form) in _SHOWN.items() if name in metrics}
        shown["GiB"] = f"{_memory(metrics):.1f}"
        if self._bar is not None:
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(done - self._bar.n)
            return
        parts = [f"{value} {_UNITS[name]}" if name in _UNITS else f"{name} {value}" for name, value in shown.items()]
        logger.info("step %d/%d  %s%s", done, self.total, "  ".join(parts), self._time_left(done))

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.close()
        self._while_bar.close()

    def _time_left(self, done: int) -> str:
        now = time.monotonic()
        if self._first is None:
            self._first = (done, now)
            return ""
        steps, since = done - self._first[0], now - self._first[1]
        left = int(since / max(1, steps) * (self.total - done))
        return f"  {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"


def _memory(metrics: Mapping[str, float]) -> float:
    """The device's peak memory or, without one, the host's."""
    return metrics.get("memory/peak_device_gib", metrics.get("memory/peak_host_gib", 0.0))
