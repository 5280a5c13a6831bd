"""`ilvr-ds doctor --cluster` on two hosts."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.cluster.hosts import Hosts
from tests.cluster.jobs import Job, by_pdsh, by_srun, hostfile
from tests.cluster.slurm import Slurm

pytestmark = pytest.mark.cluster


def doctor(launcher: str, hosts: Hosts, slurm: Slurm, folder: Path, shards: str) -> tuple[list[int], str]:
    words = ["doctor", "--cluster", "--shards", shards]
    pdsh = by_pdsh(folder, 29503, ["--no_local_rank", "--module", "ilvr_ds.cli", *words])
    command = pdsh if launcher == "pdsh" else by_srun(["ilvr-ds", *words])
    job = Job(hosts, folder, command, **hostfile(folder, hosts), **slurm.environment)
    try:
        return job.codes(), job.log
    finally:
        job.stop()


@pytest.mark.parametrize("launcher", ["pdsh", "srun"])
def test_two_equal_hosts(launcher: str, hosts: Hosts, slurm: Slurm, demo_folder: Path, tmp_path: Path) -> None:
    """Every rank has its line, the network its speed, in less than a minute."""
    begin = time.monotonic()
    codes, log = doctor(launcher, hosts, slurm, tmp_path, str(demo_folder / "train"))
    assert codes == [0], log
    assert time.monotonic() - begin < 60
    for found in ("rank 0 on h1  cpu", "rank 1 on h2  cpu", "2 on 2 hosts", "all-reduce between hosts"):
        assert found in log


def test_a_host_without_the_data_is_named(hosts: Hosts, slurm: Slurm, demo_folder: Path, tmp_path: Path) -> None:
    """/dev/shm is each host's own."""
    hosts.run("h1", "cp", "-r", str(demo_folder / "train"), "/dev/shm/train")
    codes, log = doctor("srun", hosts, slurm, tmp_path, "/dev/shm/train")
    hosts.run("h1", "rm", "-r", "/dev/shm/train")
    assert codes == [1], log
    assert "rank 1 on h2: /dev/shm/train holds no .tar file" in log
    assert "rank 0 on h1: /dev/shm/train" not in log
