"""What a process may still allocate, from the files of made-up control groups."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from ilvr_ds.monitoring import host_memory
from ilvr_ds.monitoring.host_memory import available_host_bytes

GB = 10**9
JOB = "system.slice/slurmstepd.scope/job_7"


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        host_memory, "psutil", SimpleNamespace(virtual_memory=lambda: SimpleNamespace(available=900 * GB))
    )


def v2(root: Path, path: str, limit: int | str, used: int, inactive: int = 0, high: int | str = "max") -> None:
    stat = f"anon {used - inactive}\nfile {inactive}\ninactive_file {inactive}\nactive_file 0\n"
    files = {"memory.max": limit, "memory.high": high, "memory.current": used, "memory.stat": stat}
    write(root / "sys/fs/cgroup" / path, files)


def v1(root: Path, path: str, limit: int, used: int, inactive: int = 0) -> None:
    stat = f"cache {inactive}\ninactive_file 0\ntotal_inactive_file {inactive}\n"
    files = {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": used, "memory.stat": stat}
    write(root / "sys/fs/cgroup/memory" / path, files)


def write(folder: Path, files: dict[str, object]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(f"{content}\n")


def inside(root: Path, *lines: str) -> None:
    write(root / "proc/self", {"cgroup": "\n".join(lines)})


def test_this_host_answers() -> None:
    assert 0 < available_host_bytes() <= 900 * GB


def test_without_control_groups_it_is_the_hosts(tmp_path: Path) -> None:
    assert available_host_bytes(tmp_path) == 900 * GB


def test_cached_files_count_as_free(tmp_path: Path) -> None:
    """Catches a container that has read its shards, 80 of its 100 GB, and never saves beside the training again."""
    inside(tmp_path, "0::/")
    v2(tmp_path, "", limit=100 * GB, used=90 * GB, inactive=80 * GB)
    assert available_host_bytes(tmp_path) == 90 * GB


@pytest.mark.parametrize("limited", [JOB, f"{JOB}/step_0/user/task_0", "system.slice"])
def test_the_narrowest_group_above_the_process_counts(tmp_path: Path, limited: str) -> None:
    """Catches a Slurm job that takes the whole host's memory for its own."""
    inside(tmp_path, f"0::/{JOB}/step_0/user/task_0")
    for path in ("system.slice", JOB, f"{JOB}/step_0/user/task_0"):
        v2(tmp_path, path, limit=64 * GB if path == limited else "max", used=24 * GB, inactive=4 * GB)
    assert available_host_bytes(tmp_path) == 44 * GB


def test_memory_that_throttles_is_a_limit_too(tmp_path: Path) -> None:
    inside(tmp_path, "0::/job")
    v2(tmp_path, "job", limit=64 * GB, used=20 * GB, high=60 * GB)
    assert available_host_bytes(tmp_path) == 40 * GB


def test_groups_of_version_1(tmp_path: Path) -> None:
    inside(tmp_path, "9:name=systemd:/slurm/job_7", "5:cpu,cpuacct:/slurm/job_7", "4:memory:/slurm/job_7/step_0")
    v1(tmp_path, "", limit=9223372036854771712, used=300 * GB)
    v1(tmp_path, "slurm/job_7", limit=50 * GB, used=30 * GB, inactive=10 * GB)
    v1(tmp_path, "slurm/job_7/step_0", limit=9223372036854771712, used=30 * GB, inactive=10 * GB)
    assert available_host_bytes(tmp_path) == 30 * GB


@pytest.mark.parametrize("path", ["/docker/0123456789ab", "/../../kubepods/pod_1"])
def test_a_container_finds_its_group_at_the_top(tmp_path: Path, path: str) -> None:
    """There /proc names the host's path, which is not below the mount."""
    inside(tmp_path, f"0::{path}")
    v2(tmp_path, "", limit=10 * GB, used=4 * GB)
    assert available_host_bytes(tmp_path) == 6 * GB


def test_more_used_than_allowed_is_nothing_left(tmp_path: Path) -> None:
    inside(tmp_path, "0::/")
    v2(tmp_path, "", limit=10 * GB, used=12 * GB)
    assert available_host_bytes(tmp_path) == 0
