"""Memory that the host, and the control groups of this process, can still give."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil

# limits, use, and what of it the kernel gives back when asked: the cache of files that were read or written once
_V2 = (("memory.max", "memory.high"), "memory.current", "inactive_file")
_V1 = (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file")


def available_host_bytes(root: Path = Path("/")) -> int:
    """What may be allocated: the least that the host and each control group above this process have left.

    Control groups of version 1 and 2, by /proc/self/cgroup, as schedulers and containers make them; `root` holds /proc
    and /sys.
    """
    free = int(psutil.virtual_memory().available)
    return max(0, min([free, *(left for group in _groups(root) if (left := _left(group)) is not None)]))


def _groups(root: Path) -> Iterator[Path]:
    """The folders of this process' groups, with all above them, in each hierarchy that may hold memory."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # no control groups
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        # a container may see its own groups at the top of the mount, under a path that is the host's
        names = [name for name in path.split("/") if name not in ("", "..")]
        yield from (mount.joinpath(*names[:depth]) for depth in range(len(names) + 1))


def _left(group: Path) -> int | None:
    """None: the group has no limit, or no memory is counted here."""
    for limits, use, cache in (_V2, _V1):
        try:
            used, stat = int((group / use).read_text()), (group / "memory.stat").read_text()
        except OSError:
            continue
        given_back = sum(
            int(size) for name, _, size in (line.partition(" ") for line in stat.splitlines()) if name == cache
        )
        found = [(group / limit).read_text().strip() for limit in limits if (group / limit).exists()]
        most = [int(limit) for limit in found if limit != "max"]
        return min(most) - (used - given_back) if most else None
    return None
