"""Signals that ask a run to stop, save and leave."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any


class StopSignal:
    """Within its block SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 ask to stop after the step; the same one again ends the
    process at once.

    Another one does not: launchers answer Ctrl-C with a SIGTERM to every rank, and schedulers send SIGTERM some time
    after their warning.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)

    def __init__(self) -> None:
        self.requested = False
        self._seen: set[int] = set()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        self._before = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if number in self._seen:
            os._exit(128 + number)
        self._seen.add(number)
        self.requested = True
