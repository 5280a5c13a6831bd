from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from ilvr_ds.monitoring import monitors
from ilvr_ds.monitoring.monitors import GIB, MemoryMonitor, NodeMonitor, Progress, StopSignal, of_all_ranks
from tests.monitoring.clock import Clock

METRICS = {"speed/tokens_per_s": 1234.4, "loss/total": 3.0, "loss/ce": 2.0, "loss/alignment": 1.0, "other": 7.0}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(monitors, "time", SimpleNamespace(monotonic=clock, perf_counter=clock))
    return clock


def test_host_memory_is_in_gib() -> None:
    peak = MemoryMonitor().take()["memory/peak_host_gib"]
    assert 0.05 < peak < 50, "torch alone takes 0.2; other units are a factor of 1,000 away"
    assert MemoryMonitor().summary().startswith(f"peak_host_gib {peak:.1f}")


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The second of two GPUs, as far as a NodeMonitor asks; their loads, of which an exception is raised."""
    loads: list[float] = [40, 75]

    def load(number: int) -> float:
        if isinstance(loads[number], Exception):
            raise loads[number]
        return loads[number]

    monkeypatch.setattr(monitors.dist, "device", lambda: torch.device("cuda", 1))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda number: (GIB, (number + 2) * GIB))
    monkeypatch.setattr(torch.cuda, "utilization", load)
    monkeypatch.setitem(sys.modules, "pynvml", SimpleNamespace(NVMLError=KeyError))
    return loads


def test_a_rank_asks_for_load_and_memory_of_its_own_gpu_alone(gpus: list[float]) -> None:
    """Catches a context of each rank on every GPU, which costs half a GiB there."""
    metrics = NodeMonitor().take()
    assert (metrics["gpu1_memory_gib"], metrics["gpu1_percent"]) == (2, 75)
    assert not any(name.startswith("gpu0") for name in metrics)


def test_a_host_is_shown_once_and_the_gpus_of_all_its_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = [
        ("here", 0, {"peak": 1.0}, {"cpu_percent": 30.0, "gpu0_percent": 40.0}),
        ("here", 1, {"peak": 3.0}, {"cpu_percent": 31.0, "gpu1_percent": 75.0}),
        ("there", 0, {"peak": 2.0}, {"cpu_percent": 32.0, "gpu0_percent": 10.0}),
    ]
    monkeypatch.setattr(monitors.dist, "gather_on_host", lambda mine: ranks)
    assert of_all_ranks({}, {}) == {
        "peak": 3.0,
        "system/here/cpu_percent": 30.0,
        "system/here/gpu0_percent": 40.0,
        "system/here/gpu1_percent": 75.0,
        "system/there/cpu_percent": 32.0,
        "system/there/gpu0_percent": 10.0,
    }


def test_without_nvml_the_load_is_missing_and_that_is_said_once(
    gpus: list[float], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a run that ends because a driver does not tell, and one that goes on without a word."""
    gpus[1] = KeyError("Not Supported")
    monkeypatch.setattr(monitors.dist, "local_rank", lambda: 1)
    node = NodeMonitor()
    assert all("gpu1_memory_gib" in node.take() for _ in range(2))
    assert caplog.messages == ["the load of GPU 1 is not recorded: 'Not Supported'"], "by whichever rank it is"
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr(monitors.dist, "local_rank", lambda: 0)
    caplog.clear()
    node = NodeMonitor()
    assert not any("gpu1_percent" in node.take() for _ in range(2))
    [message] = caplog.messages
    assert "pip install nvidia-ml-py" in message


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
from ilvr_ds.monitoring.monitors import StopSignal
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
        assert child.wait(timeout=10) == 128 + first
        assert child.stdout.read() == ""
    finally:
        child.kill()
        child.wait()
        child.stdout.close()


def test_progress_is_a_line_for_each_interval_with_the_time_left(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ilvr_ds")
    progress = Progress(1000, is_main=True)
    for done, seconds in ((10, 90.0), (20, 50.0), (40, 50.0)):
        clock.now += seconds
        progress.update(done, METRICS)
    progress.close()
    shown = "loss 3.0000  ce 2.0000  align 1.0000  1234 tokens/s  0.0 GiB"
    assert caplog.messages == [
        f"step 10/1000  {shown}",
        f"step 20/1000  {shown}  1:21:40 left",  # 50 s for 10 steps, 980 to go
        f"step 40/1000  {shown}  0:53:20 left",  # 100 s for 30 steps, 960 to go
    ]


def test_on_a_terminal_progress_is_a_bar_from_where_the_run_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a time left that counts the steps of an earlier start, and lines that are written into the bar."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    handlers = list(monitors.logger.handlers)
    progress = Progress(200, is_main=True)
    progress.begin(100)
    progress.update(110, METRICS)
    progress.close()
    assert monitors.logger.handlers == handlers
    first, *_, last = capsys.readouterr().err.replace("\r", "\n").strip().splitlines()
    assert "100/200 [00:00<?" in first
    for part in ("110/200 [00:00<00:", "loss=3.000", "ce=2.000", "tok/s=1234", "GiB="):
        assert part in last


def test_other_ranks_show_no_progress(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ilvr_ds")
    Progress(10, is_main=False).update(1, METRICS)
    assert not caplog.records
