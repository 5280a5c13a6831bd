"""Signals that ask a run to stop, save and leave."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")


class _Left(BaseException):
    """Work that is left where it is."""


class StopSignal:
    """Within its block SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 ask to stop after the step, or at once in what can be
    dropped (`unless_asked`); the same one again ends the process.

    Another one does not: launchers answer Ctrl-C with a SIGTERM to every rank, and schedulers send SIGTERM some time
    after their warning.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)

    def __init__(self) -> None:
        self.requested = False
        self._seen: set[int] = set()
        self._before: dict[int, Any] = {}
        self._can_leave = False

    def __enter__(self) -> StopSignal:
        self._before = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def unless_asked(self, work: Callable[[], T]) -> T | None:
        """What `work` returns; None where a signal came before it, or meanwhile, which leaves it wherever it is.

        Not for work with collectives in it: the other ranks would wait.
        """
        try:
            try:
                self._can_leave = True
                return None if self.requested else work()
            finally:
                self._can_leave = False
        except _Left:
            return None

    def _handle(self, number: int, _: FrameType | None) -> None:
        if number in self._seen:
            os._exit(128 + number)
        self._seen.add(number)
        self.requested = True
        if self._can_leave:
            self._can_leave = False
            raise _Left
