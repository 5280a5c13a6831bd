"""One process at a time trains a run: `lock.json` in its folder names the owner while it lives.

Works without flock, which shared file systems often lack: the file is made exclusively, and its owner touches it every
BEAT_S. Another process takes it over where the owner is certainly dead (same machine, process gone; an earlier start of
the same Slurm job) or has not touched it for STALE_S.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ilvr_ds import dist
from ilvr_ds.errors import UserError

logger = logging.getLogger("ilvr_ds")
FILE = "lock.json"
BEAT_S = 10.0
STALE_S = 120.0
"""An owner who has not touched its lock for this long is dead; a network file system may hide a touch for a minute."""
SETTLE_S = 0.5
"""Of two that take a lock over at once the later one has it: both check again after this pause."""


@dataclass(frozen=True)
class Owner:
    """The process that trains a run."""

    host: str = field(default_factory=socket.gethostname)
    process: int = field(default_factory=os.getpid)
    started: int | None = field(default_factory=lambda: _started(os.getpid()))
    """When the process began, in clock ticks since boot: process ids are reused."""
    machine: str = field(default_factory=lambda: _machine())
    since: str = field(default_factory=lambda: time.strftime("%Y-%m-%d %H:%M:%S %z"))
    job: str | None = field(default_factory=lambda: os.environ.get("SLURM_JOB_ID"))
    start: int = field(default_factory=lambda: int(os.environ.get("SLURM_RESTART_COUNT", "0")))
    """How often Slurm has started this job again."""
    token: str = field(default_factory=lambda: secrets.token_hex(8))

    def to_text(self) -> str:
        """What `read_owner` reads."""
        return json.dumps(asdict(self), indent=1) + "\n"

    def is_dead_for(self, other: Owner) -> bool:
        """Whether `other` can know that this one is gone: it sees its processes, or is a later start of its job."""
        if self.job is not None and self.job == other.job and self.start < other.start:
            return True  # Slurm starts a job again when nothing of it is left
        return self.machine == other.machine and _started(self.process) != self.started


@contextmanager
def run_lock(directory: Path) -> Iterator[None]:
    """Hold the lock of the run in `directory` (collective: the main rank holds it for all).

    The folder is made, and removed again where nothing is written to it. Raises UserError on all ranks where another
    process trains this run.
    """
    made = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    mine = dist.decided_by_main(lambda: _take(directory))
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


def _take(directory: Path) -> Owner:
    """Make the lock, or take that of a dead owner over; raises UserError."""
    path, mine = directory / FILE, Owner()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if _make(path, mine):
            return mine
        other, silent_s = read_owner(path), _silent_s(path)
        if not (other and other.is_dead_for(mine)) and silent_s < STALE_S:
            raise UserError(_refusal(directory, other, mine, silent_s))
        logger.warning("took over the lock of %s, which is gone", named(other))
        _replace(path, mine)
        time.sleep(SETTLE_S)
        if (winner := read_owner(path)) != mine:
            raise UserError(_refusal(directory, winner, mine, 0.0))
    except OSError as error:
        raise UserError(f"run.output_dir: cannot write to {directory} ({error.strerror})") from error
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
                logger.error("%s: %s has taken this run over; this process ends", path, named(owner))
                os._exit(1)
            os.utime(path)
        except OSError as error:
            logger.warning("%s: cannot be touched (%s); training goes on", path, error.strerror)


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


def read_owner(path: Path) -> Owner | None:
    """Whom a file names; None where there is no file, or one that names nobody: its owner was killed while it wrote, or
    still writes."""
    try:
        return Owner(**json.loads(path.read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _refusal(directory: Path, other: Owner | None, mine: Owner, silent_s: float) -> str:
    advice = "wait for its end, or take another run.name"
    if other is None or other.machine != mine.machine:
        left = max(1.0, STALE_S - silent_s)
        advice += f"; if it is gone, start again in {left:.0f} s, or delete {directory / FILE}"
    return f"run.name: {directory} is being trained by {named(other)}; {advice}"


def named(owner: Owner | None) -> str:
    """An owner, for messages."""
    return (
        "a process that has not said its name"
        if owner is None
        else f"process {owner.process} on {owner.host}, since {owner.since}"
    )


def _machine() -> str:
    """Same text: the same processes are seen. A boot of a kernel, and the container's part of its processes."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # not Linux: only the touch tells
        return secrets.token_hex(8)


def _started(process: int) -> int | None:
    """When a process began, in ticks since boot; None where there is none, or only its exit code is left."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])
