"""One process at a time trains a run, or answers into an evaluation's folder: `lock.json` in it names the owner.

Works without flock, which shared file systems often lack: the file is made exclusively, and its owner touches it every
BEAT_S. Another process takes it over where the owner is certainly dead (same machine, process gone; an earlier start of
the same Slurm job) or has not touched it for STALE_S.
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ilvr_ds import dist
from ilvr_ds.errors import UserError
from ilvr_ds.owner import Owner, named, read_owner

logger = logging.getLogger("ilvr_ds")
FILE = "lock.json"
BEAT_S = 10.0
STALE_S = 120.0
"""An owner who has not touched its lock for this long is dead; a network file system may hide a touch for a minute."""
SETTLE_S = 0.5
"""Of two that take a lock over at once the later one has it: both check again after this pause."""


@dataclass(frozen=True)
class Work:
    """What is done in the folder, for messages."""

    parent: str
    """The setting that says where the folder lies"""
    name: str
    """The setting that gives it a name"""
    doing: str
    other: str
    """What to do instead of waiting"""


TRAINING = Work("run.output_dir", "run.name", "trained", "take another run.name")
ANSWERING = Work("--output", "--output", "written", "give another --output")


@contextmanager
def run_lock(directory: Path, work: Work = TRAINING) -> Iterator[None]:
    """Hold the lock of the run in `directory` (collective: the main rank holds it for all).

    The folder is made, and removed again where nothing is written to it. Raises UserError on all ranks where another
    process holds it.
    """
    made = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    mine = dist.decided_by_main(lambda: _take(directory, work))
    if not dist.is_main():
        yield
        return
    ended = threading.Event()
    threading.Thread(target=_keep, args=(directory / FILE, mine, ended), name="run lock", daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        with suppress(OSError):  # then it goes stale
            if read_owner(directory / FILE) == mine:
                (directory / FILE).unlink()
            for folder in made:
                folder.rmdir()  # refused where it is not empty


def _take(directory: Path, work: Work = TRAINING) -> Owner:
    """Make the lock, or take that of a dead owner over; raises UserError."""
    path, mine = directory / FILE, Owner()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if _make(path, mine):
            return mine
        other, silent_s = read_owner(path), _silent_s(path)
        if not (other and other.is_dead_for(mine)) and silent_s < STALE_S:
            raise UserError(_refusal(work, directory, other, mine, silent_s))
        logger.warning("took over the lock of %s, which is gone", named(other))
        _replace(path, mine)
        time.sleep(SETTLE_S)
        if (winner := read_owner(path)) != mine:
            raise UserError(_refusal(work, directory, winner, mine, 0.0))
    except OSError as error:
        raise UserError(f"{work.parent}: cannot write to {directory} ({error.strerror})") from error
    return mine


def _make(path: Path, mine: Owner) -> bool:
    """False where there is a lock."""
    try:
        with path.open("x") as file:
            file.write(mine.to_text())
    except FileExistsError:
        return False
    except OSError:
        path.unlink(missing_ok=True)  # a full disk: it names nobody
        raise
    return True


def _replace(path: Path, mine: Owner) -> None:
    temporary = path.with_name(f"{path.name}.{mine.token}")
    temporary.write_text(mine.to_text())
    temporary.replace(path)


def _keep(path: Path, mine: Owner, ended: threading.Event) -> None:
    """The thread: touch the lock; end the process where another has taken it, or both would write one record."""
    while not ended.wait(BEAT_S):
        try:
            if (owner := read_owner(path)) is not None and owner != mine:
                logger.error("%s: %s has taken over; this process ends", path, named(owner))
                os._exit(1)
            os.utime(path)
        except OSError as error:
            logger.warning("%s: cannot be touched (%s); the work goes on", path, error.strerror)


def _silent_s(path: Path) -> float:
    """Seconds since the lock was touched, by the clock of the file system: those of hosts may differ."""
    probe = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    try:
        probe.touch()
        with path.open() as file:  # opening asks a network file system anew
            return probe.stat().st_mtime - os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:  # released meanwhile
        return STALE_S
    finally:
        probe.unlink(missing_ok=True)


def _refusal(work: Work, directory: Path, other: Owner | None, mine: Owner, silent_s: float) -> str:
    advice = f"wait for its end, or {work.other}"
    if other is None or other.machine != mine.machine:
        left = max(1.0, STALE_S - silent_s)
        advice += f"; if it is gone, start again in {left:.0f} s, or delete {directory / FILE}"
    return f"{work.name}: {directory} is being {work.doing} by {named(other)}; {advice}"
