"""Processes by name: whether one that left its name in a file is gone, also on another host, as far as can be known."""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Owner:
    """A process that trains a run, or writes a folder."""

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


def read_owner(path: Path) -> Owner | None:
    """Whom a file names; None where there is no file, or one that names nobody: its owner was killed while it wrote, or
    still writes."""
    try:
        return Owner(**json.loads(path.read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return None


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
