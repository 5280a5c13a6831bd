from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from ilvr_ds.monitoring.stop_signal import StopSignal


@pytest.mark.parametrize("number", StopSignal.SIGNALS)
def test_a_signal_asks_to_stop_and_the_handlers_come_back(number: int) -> None:
    before = signal.getsignal(number)
    with StopSignal() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("first", StopSignal.SIGNALS)
def test_only_the_same_signal_again_ends_the_process_at_once(first: signal.Signals) -> None:
    """Launchers send SIGTERM after a Ctrl-C, schedulers after SIGUSR1, which must not cost the checkpoint."""
    script = """
import time
from ilvr_ds.monitoring.stop_signal import StopSignal
with StopSignal() as stop:
    print("ready", flush=True)
    while not stop.requested:
        time.sleep(0.01)
    print("asked", flush=True)
    try:
        time.sleep(60)
    finally:
        print("cleaned up", flush=True)
"""
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    try:
        assert child.stdout.readline() == "ready\n"
        child.send_signal(first)
        assert child.stdout.readline() == "asked\n"
        for number in set(StopSignal.SIGNALS) - {first}:
            child.send_signal(number)
            time.sleep(0.2)
            assert child.poll() is None
        child.send_signal(first)
        assert child.wait(timeout=60) == 128 + first
        assert child.stdout.read() == ""
    finally:
        child.kill()
        child.wait()
        child.stdout.close()


@pytest.mark.parametrize("number", StopSignal.SIGNALS)
def test_what_can_be_dropped_is_left_at_once(number: signal.Signals) -> None:
    """Catches a handler that `except Exception` holds up, and one that ends what may not be dropped."""

    def work() -> str:
        try:
            signal.raise_signal(number)
            time.sleep(60)
        except Exception:  # noqa: BLE001
            time.sleep(60)
        return "done"

    with StopSignal() as stop:
        assert stop.unless_asked(lambda: "done") == "done"
        assert stop.unless_asked(work) is None and stop.requested
        assert stop.unless_asked(lambda: "done") is None, "asked before it began"
    with StopSignal() as stop:
        signal.raise_signal(number)
        assert stop.requested, "outside of it nothing is raised"
