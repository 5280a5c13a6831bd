from __future__ import annotations

import logging
import os
import time
from pathlib import Path

import pytest

from ilvr_ds.training.build_locks import STALE_S, clear_stale_locks


def test_an_old_lock_is_deleted_and_a_young_one_named(
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
        clear_stale_locks()
    assert not old.exists() and young.exists()
    first, second = sorted(caplog.messages)
    assert str(young) in first and "waits for ever" in first
    assert str(old) in second and "deleted" in second
