"""SIGTERM ends a server of ours as Ctrl-C does."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def signals_as_ctrl_c() -> Iterator[None]:
    """Within its block SIGINT and SIGTERM raise KeyboardInterrupt."""
    ends = (signal.SIGINT, signal.SIGTERM)  # SIGINT too: a script's background processes are born ignoring it
    before = [signal.signal(number, signal.default_int_handler) for number in ends]
    try:
        yield
    finally:
        for number, handler in zip(ends, before, strict=True):
            signal.signal(number, handler)
