from __future__ import annotations

import fcntl
import logging
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest
from torch.utils.file_baton import FileBaton

from ilvr_ds.engine.build_locks import STALE_S, building

FORK = multiprocessing.get_context("fork")


def compile_for(seconds: float, root: Path, begun: Event) -> None:
    """What torch does within its load()."""
    lock = root / "py311_cpu/adam/lock"
    with building("adam"):
        lock.parent.mkdir(parents=True, exist_ok=True)
        baton = FileBaton(str(lock))
        assert baton.try_acquire()
        begun.set()
        time.sleep(seconds)
        baton.release()


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    caplog.set_level(logging.WARNING, logger="ilvr_ds")
    return tmp_path


@pytest.fixture(params=["flock", "no flock"])
def file_system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Some that hosts share have no locks."""
    if request.param == "no flock":

        def refuse(*_: object) -> None:
            raise OSError(38, "Function not implemented")

        monkeypatch.setattr(fcntl, "flock", refuse)
    return str(request.param)


def build(root: Path, seconds: float) -> multiprocessing.process.BaseProcess:
    """Another process that has begun to compile."""
    begun = FORK.Event()
    process = FORK.Process(target=compile_for, args=(seconds, root, begun), daemon=True)
    process.start()
    assert begun.wait(30)
    return process


def seconds_to_enter() -> float:
    begin = time.monotonic()
    with building("adam"):
        return time.monotonic() - begin


def test_what_a_killed_build_left_holds_up_nobody(
    root: Path, file_system: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a start that waits a quarter of an hour for a process that is gone."""
    process = build(root, 600)
    process.kill()
    process.join()
    lock = root / "py311_cpu/adam/lock"
    assert lock.exists()
    assert seconds_to_enter() < 5
    assert not lock.exists()
    [line] = caplog.messages
    assert f"deleted {lock}: process {process.pid} on " in line


def test_a_running_build_is_waited_for_and_named(
    root: Path, file_system: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a start that breaks into it."""
    process = build(root, 3)
    assert seconds_to_enter() > 1
    process.join()
    assert process.exitcode == 0
    [line] = caplog.messages
    assert f"process {process.pid} on " in line
    assert seconds_to_enter() < 0.5


@pytest.fixture
def lock(root: Path) -> Iterator[Path]:
    """Torch's lock, by a process that is not on this host and knows nothing of our lock."""
    lock = root / "adam/lock"
    lock.parent.mkdir()
    lock.touch()
    yield lock
    assert not lock.exists()


def test_a_lock_of_an_unknown_process_counts_until_it_is_old(lock: Path, caplog: pytest.LogCaptureFixture) -> None:
    almost = time.time() - STALE_S + 1
    os.utime(lock, (almost, almost))
    assert 0.3 < seconds_to_enter() < 10
    waiting, deleted = caplog.messages
    assert str(lock) in waiting and "or wait 0 minutes" in waiting
    assert str(lock) in deleted


def test_its_build_ends(lock: Path, caplog: pytest.LogCaptureFixture) -> None:
    threading.Timer(1.0, lock.unlink).start()
    assert seconds_to_enter() > 0.9
    [line] = caplog.messages
    assert "wait 15 minutes" in line


def test_a_first_build_is_said_with_its_time(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches minutes of silence at a first start."""
    caplog.set_level(logging.INFO, logger="ilvr_ds")
    for _ in range(2):
        with building("adam"):
            (root / "py311_cpu/adam").mkdir(parents=True, exist_ok=True)
            (root / "py311_cpu/adam/adam.so").touch()
    assert caplog.messages == [
        f"adam is compiled into {root}, once on this machine; it takes about a minute",
        "adam is compiled, in 0 s",
    ], "the second time it is there"
