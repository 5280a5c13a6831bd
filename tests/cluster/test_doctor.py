"""`ilvr-ds doctor --cluster` on eight ranks: quick where all are alike, plain about the one that is not."""

from __future__ import annotations

import importlib.metadata
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.hosts import Hosts
from tests.cluster.jobs import Job, by_pdsh, by_srun, hostfile, stop
from tests.cluster.slurm import Slurm
from tests.ranks import ROOT

pytestmark = pytest.mark.cluster
SHARDS = "/dev/shm/train"
"""Each host's own."""


def run(job: Job) -> tuple[list[int], str]:
    """Exit codes and what was printed."""
    try:
        return job.codes(), job.log
    finally:
        stop(job.hosts, job)


def test_equal_hosts_are_well(hosts: Hosts, demo_folder: Path, tmp_path: Path) -> None:
    """Two hosts of four ranks: a line each, the speeds within and between hosts, in less than a minute."""
    words = ["doctor", "--cluster", "--shards", str(demo_folder / "train")]
    commands = by_pdsh(tmp_path, 29503, ["--no_local_rank", "--module", "ilvr_ds.cli", *words])
    busy = os.getloadavg()[0] / (os.cpu_count() or 1)  # others' work, if any, makes this one's take longer
    begin = time.monotonic()
    codes, log = run(Job(hosts, tmp_path, commands, **hostfile(tmp_path, slots=4)))
    took = time.monotonic() - begin
    print(f"doctor on 8 ranks: {took:.1f} s, begun under a load of {busy:.1f} a core")
    assert codes == [0], log
    # a minute where each rank has a core, as on a node; here eight Pythons start on a few
    assert took < 60 * max(1.0, busy, 8 / (os.cpu_count() or 1)), log
    rows = [f"rank {rank} on h{1 + rank // 4}  cpu" for rank in range(8)]
    for found in (*rows, "8 on 2 hosts", "all-reduce within hosts", "all-gather between hosts"):
        assert found in log


@pytest.fixture
def odd_host(hosts: Hosts, demo_folder: Path, tmp_path: Path) -> Iterator[str]:
    """One that lacks the data, and has another version of this code and of webdataset than the others."""
    metadata = Path(str(importlib.metadata.distribution("webdataset").locate_file("."))).resolve()
    [metadata] = metadata.glob("webdataset-*.dist-info/METADATA")
    (tmp_path / "METADATA").write_text(re.sub(r"(?m)^Version: .*$", "Version: 0.2.100", metadata.read_text()))
    code = ROOT / "ilvr_ds/errors.py"
    (tmp_path / "errors.py").write_text(code.read_text() + "# changed\n")
    for name in ("h1", "h2"):
        hosts.run(name, "cp", "-r", str(demo_folder / "train"), SHARDS)
    for file in (metadata, code):  # each host has mounts of its own
        hosts.run("h3", "mount", "--bind", str(tmp_path / file.name), str(file))
    yield "h3"
    for file in (metadata, code):
        hosts.run("h3", "umount", str(file))
    for name in ("h1", "h2"):
        hosts.run(name, "rm", "-r", SHARDS)


def test_the_odd_one_out_is_named(hosts: Hosts, slurm: Slurm, odd_host: str, tmp_path: Path) -> None:
    """Three hosts, as many ranks as before: a majority is right."""
    words = ["ilvr-ds", "doctor", "--cluster", "--shards", SHARDS]
    codes, log = run(Job(hosts, tmp_path, by_srun(words, hosts.names, tasks=8), **slurm.environment))
    assert codes == [1], log
    assert "8 on 3 hosts" in log
    missing = rf"{SHARDS}/dataset\.json: cannot be read"
    for what, value in (("webdataset", "0.2.100"), ("code", r"\w{12}"), ("shards", missing)):
        [line] = re.findall(rf"(?m)^.*\b{what}\b.*on {odd_host}: .*$", log)
        assert re.search(rf"rank [67] on {odd_host}: {value}", line), line
        assert not re.search(r"rank \d on h[12]:", line), line
