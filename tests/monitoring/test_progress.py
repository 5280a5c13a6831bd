from __future__ import annotations

import logging
import sys
from types import SimpleNamespace

import pytest

from ilvr_ds.monitoring import progress as module
from ilvr_ds.monitoring.progress import Progress
from tests.monitoring.clock import Clock

METRICS = {"speed/tokens_per_s": 1234.4, "loss/total": 3.0, "loss/ce": 2.0, "loss/alignment": 1.0, "other": 7.0}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=clock, perf_counter=clock))
    return clock


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


EVERYTHING = {
    **METRICS, "loss/contrastive": 0.5, "lr": 1e-5, "grad/norm": 0.8347, "epoch": 1.256, "speed/mfu": 0.4123,
    "memory/peak_device_gib": 20.14,
}  # fmt: skip


def test_the_line_says_losses_by_part_the_step_and_the_machine(caplog: pytest.LogCaptureFixture) -> None:
    """Catches a line without gradient norm, learning rate, epoch and MFU, for which people open a browser."""
    caplog.set_level(logging.INFO, "ilvr_ds")
    Progress(1000, is_main=True).update(10, EVERYTHING)
    assert caplog.messages == [
        "step 10/1000  loss 3.0000  ce 2.0000  align 1.0000  contrast 0.5000  lr 1.00e-05  grad 0.835  epoch 1.26  "
        "1234 tokens/s  MFU 41.2%  20.1 GiB"
    ]


def test_the_bar_says_the_same(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "300")
    progress = Progress(200, is_main=True)
    progress.begin(0)
    progress.update(10, EVERYTHING)
    progress.close()
    last = capsys.readouterr().err.replace("\r", "\n").strip().splitlines()[-1]
    for part in ("contrast=0.5000", "lr=1.00e-05", "grad=0.835", "epoch=1.26", "MFU=41.2%", "GiB=20.1"):
        assert part in last


def test_on_a_terminal_progress_is_a_bar_from_where_the_run_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a time left that counts the steps of an earlier start, and lines that are written into the bar."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    handlers = list(module.logger.handlers)
    progress = Progress(200, is_main=True)
    progress.begin(100)
    progress.update(110, METRICS)
    progress.close()
    assert module.logger.handlers == handlers
    first, *_, last = capsys.readouterr().err.replace("\r", "\n").strip().splitlines()
    assert "100/200 [00:00<?" in first
    for part in ("110/200 [00:00<00:", "loss=3.000", "ce=2.000", "tok/s=1234", "GiB="):
        assert part in last


def test_other_ranks_show_no_progress(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ilvr_ds")
    Progress(10, is_main=False).update(1, METRICS)
    assert not caplog.records
