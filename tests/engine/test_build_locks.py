from __future__ import annotations

import logging
import os
import threading
import time
from pathlib import Path

import pytest

from ilvr_ds.engine.build_locks import STALE_S, wait_for_builds


def test_an_old_lock_is_deleted_and_a_young_one_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a start that waits in silence for a process that is gone, and one that breaks into a running build."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    old, young = tmp_path / "py311_cpu/shm/lock", tmp_path / "adam/lock"
    for lock in (old, young):
        lock.parent.mkdir(parents=True)
        lock.touch()
    long_ago = time.time() - STALE_S - 60
    os.utime(old, (long_ago, long_ago))
    with caplog.at_level(logging.WARNING, logger="ilvr_ds"):
        threading.Timer(1.0, young.unlink).start()  # its build ends
        begin = time.monotonic()
        wait_for_builds()
    assert time.monotonic() - begin > 0.9
    assert not old.exists()
    first, second = sorted(caplog.messages)
    assert str(young) in first and "wait 15 minutes" in first
    assert str(old) in second and "deleted" in second


def test_a_lock_that_grows_old_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its build was killed a moment ago: nobody waits for ever."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "shm/lock"
    lock.parent.mkdir()
    lock.touch()
    almost = time.time() - STALE_S + 1
    os.utime(lock, (almost, almost))
    wait_for_builds()
    assert not lock.exists()
