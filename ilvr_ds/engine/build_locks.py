"""One process at a time compiles an operator of DeepSpeed, and one that is killed meanwhile blocks nobody.

Torch compiles under a lock file that names no process: a killed process leaves it behind, and every later start would
wait for it silently, for ever. So a lock of our own is held around the build. The system releases it when its owner
dies, on another host too, and it names the owner: torch's lock that this owner left is then stale.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import psutil
from torch.utils.cpp_extension import get_default_build_root

from ilvr_ds import dist

logger = logging.getLogger("ilvr_ds")
STALE_S = 900
"""Age in seconds at which a lock without a known owner is stale; operators compile in about a minute."""
PAUSE_S = 0.5


@dataclass(frozen=True)
class _Owner:
    host: str
    process: int
    since: float
    """Unix time"""

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}, since {time.strftime('%H:%M:%S', time.localtime(self.since))}"


@contextmanager
def building(name: str) -> Iterator[None]:
    """Hold the lock while the operator `name` is compiled, or loaded where it is compiled already.

    Waits for another process that compiles it, and logs which; deletes what a dead one left. Says what is compiled
    here for the first time, and at the end how long it took.
    """
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    root.mkdir(parents=True, exist_ok=True)
    with (root / f"{name}.building").open("a+") as file:
        has_lock = _lock(file, name)
        before = _owner(file)  # it has left the file as it was: it died
        _clear([root / name / "lock", *root.glob(f"*/{name}/lock")], before if has_lock or _is_gone(before) else None)
        _write(file, _Owner(socket.gethostname(), os.getpid(), time.time()))
        is_new = not [*root.glob(f"{name}/{name}.so"), *root.glob(f"*/{name}/{name}.so")]
        start = time.monotonic()
        if is_new:
            logger.info("%s is compiled into %s, once on this machine; it takes about a minute", name, root)
        yield
        if is_new:
            logger.info("%s is compiled, in %.0f s", name, time.monotonic() - start)
        _write(file, None)


def _lock(file: IO[str], name: str) -> bool:
    """Wait for the file's lock; False where the file system has none, and torch's own must do."""
    is_told = False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if not is_told and (owner := _owner(file)):
                dist.warn("waiting for %s to be compiled by %s", name, owner)
                is_told = True
            time.sleep(PAUSE_S)
        except OSError:
            return False


def _clear(locks: list[Path], dead: _Owner | None) -> None:
    """Return when no lock of torch's is left: delete those of the `dead` owner and those that are too old, wait for
    others."""
    told: set[Path] = set()
    while there := [(lock, made) for lock in locks if (made := _time_of(lock)) is not None]:
        for lock, made in there:
            age = time.time() - made
            holder = _holder(lock)
            if holder is None and (dead or age > STALE_S):
                lock.unlink(missing_ok=True)
                dist.warn("deleted %s: %s was killed while it compiled", lock, dead or "its owner")
            elif lock not in told:
                who = f"process {holder} on this host holds {lock}" if holder else f"somebody holds {lock}"
                remedy = (
                    "" if holder else f"; if nobody compiles, delete it, or wait {(STALE_S - age) / 60:.0f} minutes"
                )
                dist.warn("%s%s", who, remedy)
                told.add(lock)
        time.sleep(PAUSE_S)


def _holder(lock: Path) -> int | None:
    """The process of this host that has torch's lock file open, as its owner does; None: it is not here."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if any(Path(file.path) == lock.resolve() for file in process.open_files()):
                return int(process.pid)
    return None


def _is_gone(owner: _Owner | None) -> bool:
    """Whether the owner can be seen to be dead without the system's lock: on this host alone."""
    return owner is not None and owner.host == socket.gethostname() and not psutil.pid_exists(owner.process)


def _owner(file: IO[str]) -> _Owner | None:
    file.seek(0)
    try:
        return _Owner(**json.loads(file.read()))
    except (ValueError, TypeError):  # nobody, or a line that is being written
        return None


def _write(file: IO[str], owner: _Owner | None) -> None:
    file.seek(0)
    file.truncate()
    if owner:
        file.write(json.dumps(asdict(owner)))
    file.flush()


def _time_of(lock: Path) -> float | None:
    """None: it is gone, for its build has just ended."""
    try:
        return lock.stat().st_mtime
    except FileNotFoundError:
        return None
