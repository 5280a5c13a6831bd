"""All ranks of a job, compared: `ilvr-ds doctor --cluster`, started as a training run is.

Every rank examines its host; the main rank compares them and names those that differ.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import socket
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch

from ilvr_ds import dist
from ilvr_ds.data.shards import open_dataset
from ilvr_ds.doctor import GIB, SMALL_DISK_GIB, SMALL_SHM_GIB, Check, Status
from ilvr_ds.errors import RunError, UserError, first_line
from ilvr_ds.ops import build
from ilvr_ds.provenance import PACKAGES, installed

TIMEOUT_S = 120
"""A rank waits this long for the others."""
MESSAGE_MIB = {"cuda": 256, "cpu": 8}
"""Size of the messages whose speed is measured."""
READ_MIB = 64
"""How much of a shard is read; what the host has read before comes from its page cache."""
CLOCK_S = 2.0
"""How far clocks may differ: errors of several ranks are put in order by time."""
SLOW = 0.5
"""A rank below this fraction of the median is slow."""
_PACKAGES = ("numpy", *PACKAGES)


@dataclass(frozen=True)
class Findings:
    """What one rank found on its host."""

    rank: int
    host: str
    device: str
    same: dict[str, str]
    """what must be equal on all ranks: versions, the code's checksum"""
    free_disk_gib: float
    shared_memory_gib: float
    clock_s: float
    """clock right after a barrier"""
    read_mib_s: float | None
    """None: no shards given, or not readable"""
    unreadable: str
    """why the shards cannot be read"""

    def line(self, clock_s: float) -> str:
        """One row of the table, with the clock relative to `clock_s`."""
        read = f"  shards {self.read_mib_s:.0f} MiB/s" if self.read_mib_s else ""
        space = f"disk {self.free_disk_gib:.0f} GiB free  /dev/shm {self.shared_memory_gib:.1f} GiB"
        return f"{self.name}  {self.device}  {space}  clock {self.clock_s - clock_s:+.2f} s{read}"

    @property
    def name(self) -> str:
        """The rank as the watchdog names it."""
        return f"rank {self.rank} on {self.host}"


def examine(shards: str | None) -> tuple[list[str], list[Check]]:
    """Rows of all ranks, and checks over them (collective). Raises RunError if ranks cannot communicate."""
    device = dist.device().type
    try:
        dist.join(timedelta(seconds=TIMEOUT_S))
        everyone = dist.gather_on_host(_examine_host(shards))
        hosts: dict[str, list[int]] = {}
        for findings in everyone:
            hosts.setdefault(findings.host, []).append(findings.rank)
        num_bytes = MESSAGE_MIB[device] * 2**20
        pairs = [(kind, *speeds) for kind, groups in _groups(hosts) for speeds in [dist.speeds(groups, num_bytes)]]
        measured = dist.gather_on_host(pairs)
    except RuntimeError as error:
        where = f"{socket.gethostname()}, MASTER_ADDR {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise RunError(
            f"ranks cannot talk over {dist.backend()} ({where}): {first_line(error)}; see docs/clusters.md"
        ) from error
    clock_s = statistics.median(findings.clock_s for findings in everyone)
    names = [findings.name for findings in everyone]
    checks = [*compare(everyone), *_speeds(names, measured)]
    return [findings.line(clock_s) for findings in everyone], checks


def compare(everyone: list[Findings]) -> Iterator[Check]:
    """Checks over the findings of all ranks; where they differ, the minority is named."""
    hosts = len({findings.host for findings in everyone})
    yield Check("ranks", "ok", f"{len(everyone)} on {hosts} host{'s' * (hosts > 1)}")
    for key in everyone[0].same:
        usual, _ = Counter(findings.same[key] for findings in everyone).most_common(1)[0]
        if key in PACKAGES and all(findings.same[key] == "none" for findings in everyone):
            continue
        odd = [f"{findings.name}: {findings.same[key]}" for findings in everyone if findings.same[key] != usual]
        remedy = "give every host the same copy" if key == "data" else "install the same on every host"
        yield Check(key, "bad" if odd else "ok", "; ".join([usual, *odd]), remedy * bool(odd))
    if unreadable := [f"{findings.name}: {findings.unreadable}" for findings in everyone if findings.unreadable]:
        yield Check("shards", "bad", "; ".join(unreadable), "mount them at the same path on every host")
    yield from _at_least("disk", everyone, "free_disk_gib", SMALL_DISK_GIB, "GiB free")
    yield from _at_least("/dev/shm", everyone, "shared_memory_gib", SMALL_SHM_GIB, "GiB")
    clock_s = statistics.median(findings.clock_s for findings in everyone)
    late = [f"{f.name}: {f.clock_s - clock_s:+.1f} s" for f in everyone if abs(f.clock_s - clock_s) > CLOCK_S]
    yield Check(
        "clocks", "note" if late else "ok", "; ".join(late) or f"within {CLOCK_S:.0f} s", "run ntp" * bool(late)
    )
    reads = [f.read_mib_s for f in everyone if f.read_mib_s is not None]
    if reads:
        slow = [f.name for f in everyone if (f.read_mib_s or 0) < SLOW * statistics.median(reads)]
        yield _slow("reading", statistics.median(reads), "MiB/s", slow)


def _examine_host(shards: str | None) -> Findings:
    read, data, unreadable = _read(shards)
    operators = _operators()
    dist.barrier()
    return Findings(
        rank=dist.rank(),
        host=socket.gethostname(),
        device=_device(),
        same={"python": platform.python_version(), **{name: installed(name) or "none" for name in _PACKAGES}}
        | {"code": _code(), "driver": _driver(), "operators": operators}
        | ({"data": data} if shards is not None else {}),
        free_disk_gib=shutil.disk_usage(Path.cwd()).free / GIB,
        shared_memory_gib=shutil.disk_usage("/dev/shm").total / GIB if Path("/dev/shm").is_dir() else 0.0,
        clock_s=time.time(),
        read_mib_s=read,
        unreadable=unreadable,
    )


def _device() -> str:
    device = dist.device()
    return f"{device} {torch.cuda.get_device_name(device)}" if device.type == "cuda" else "cpu"


def _code() -> str:
    """A checksum of this package: every host may have a copy of its own."""
    package = Path(__file__).parent
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(file.relative_to(package).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]


def _operators() -> str:
    """How the native operators run. Compiles them if needed, so that a training run finds them built."""
    try:
        return build.load().kind
    except build.BuildError as error:
        return f"not built ({str(error).partition(chr(10))[0]})"


def _driver() -> str:
    file = Path("/proc/driver/nvidia/version")
    number = re.search(r"\d+\.\d+[\d.]*", file.read_text()) if file.is_file() else None
    return number.group() if number else "none"


def _read(shards: str | None) -> tuple[float | None, str, str]:
    """Reading speed in MiB/s and a checksum of what the shards hold, else why there is none."""
    if shards is None:
        return None, "", ""
    try:
        dataset = open_dataset(shards)
        shard = dataset.manifest.shards[dist.rank() % len(dataset.manifest.shards)]
        start = time.perf_counter()
        size = len(dataset.storage.read_range(shard.name, 0, min(READ_MIB * 2**20, shard.size_bytes)))
    except UserError as error:
        return None, "none", str(error)
    return size / 2**20 / (time.perf_counter() - start), dataset.fingerprint[:12], ""


def _groups(hosts: dict[str, list[int]]) -> Iterator[tuple[str, list[list[int]]]]:
    """Groups of ranks to measure: those of each host; then, across hosts, all first ranks, all second ranks, ..."""
    if max(map(len, hosts.values())) > 1:
        yield "within hosts", list(hosts.values())
    if len(hosts) > 1:
        count = min(map(len, hosts.values()))
        yield "between hosts", [[ranks[number] for ranks in hosts.values()] for number in range(count)]


def _speeds(names: list[str], measured: list[list[tuple[str, float, float]]]) -> Iterator[Check]:
    for number, (kind, *_) in enumerate(measured[0]):
        for place, call in enumerate(("all-reduce", "all-gather"), start=1):
            found = {name: float(rows[number][place]) for name, rows in zip(names, measured, strict=True)}
            taking_part = [speed for speed in found.values() if speed]
            usual = statistics.median(taking_part)
            yield _slow(f"{call} {kind}", usual, "GB/s", [n for n, s in found.items() if 0 < s < SLOW * usual])


def _slow(what: str, usual: float, unit: str, slow: list[str]) -> Check:
    status: Status = "note" if slow else "ok"
    return Check(
        what, status, f"{usual:.2f} {unit} (median)" + (f"; below half of it: {', '.join(slow)}" if slow else "")
    )


def _at_least(name: str, everyone: list[Findings], field: str, least: float, unit: str) -> Iterator[Check]:
    small = [
        f"{findings.name}: {getattr(findings, field):.1f}" for findings in everyone if getattr(findings, field) < least
    ]
    yield Check(name, "note" if small else "ok", f"{'; '.join(small) or f'{least} or more'} {unit}")
