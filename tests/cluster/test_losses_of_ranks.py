"""A rank or a link that is lost ends the job on every host, in time and by name, whoever started it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster.hosts import Hosts
from tests.cluster.jobs import Job, arguments, by_pdsh, by_srun, by_torchrun, hostfile
from tests.cluster.slurm import Slurm

pytestmark = pytest.mark.cluster
SILENT_S = 10
"""`run.rank_timeout_s` of these runs."""
END_S = 45
"""From the fault to the last process: the time-out, the farewell of the ranks and that of their launchers."""
GIVE_UP_S = 120
"""So long launchers may wait for a host that does not answer: ssh 15 s, Slurm until it has declared the node dead."""
LAUNCHERS = ["pdsh", "torchrun", "srun"]


def start(
    launcher: str, hosts: Hosts, slurm: Slurm, folder: Path, demo: Path, fault: str = "killed_alone", at: int = 4
) -> Job:
    """A long run of two ranks in which `fault` strikes in step `at`, counted from 1."""
    words = arguments(folder, demo, train__max_steps=5000, run__rank_timeout_s=SILENT_S, data__num_workers=1)
    module = ["tests.distributed.faulty", fault, "all", str(at), "train", *words]
    commands = {
        "pdsh": lambda: by_pdsh(folder, 29502, ["--no_local_rank", "--module", *module]),
        "torchrun": lambda: by_torchrun(hosts, 29502, ["-m", *module]),
        "srun": lambda: by_srun(["python3", "-m", *module]),
    }[launcher]()
    return Job(hosts, folder, commands, **hostfile(folder, hosts), **slurm.environment)


def wait_until(what: Callable[[], bool], limit_s: float, job: Job) -> float:
    """Seconds until `what` holds."""
    begin = time.monotonic()
    while not what():
        assert time.monotonic() - begin < limit_s, job.log[-4000:]
        time.sleep(0.2)
    return time.monotonic() - begin


def ranks(hosts: Hosts, folder: Path) -> list[list[int]]:
    """Processes of this run on each host: ranks, their loader workers, launchers."""
    return [hosts.processes(name, f"run.output_dir={folder}") for name in hosts.names]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_killed_rank_ends_the_job_on_all_hosts(
    launcher: str, hosts: Hosts, slurm: Slurm, demo_folder: Path, tmp_path: Path
) -> None:
    """kill -9 on h2 while rank 0 is outside collectives: pdsh and torchrun alone would wait for ever."""
    job = start(launcher, hosts, slurm, tmp_path, demo_folder)
    try:
        job.wait_for("step 3/")
        took = wait_until(lambda: not any(ranks(hosts, tmp_path)), END_S, job)
        print(f"{launcher}: all ranks gone {took:.1f} s after the last whole step")
        assert any(job.codes(END_S)), job.log[-4000:]
        named = "h2: task 1: Killed" if launcher == "srun" else "no sign of life from rank 1 on h2"
        assert named in job.log, job.log[-4000:]
    finally:
        job.stop()


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_cut_link_ends_the_job_on_both_sides(
    launcher: str, hosts: Hosts, slurm: Slurm, demo_folder: Path, tmp_path: Path
) -> None:
    """Nothing is refused, nothing arrives: each side has only its clock."""
    job = start(launcher, hosts, slurm, tmp_path, demo_folder, at=10**6)
    try:
        job.wait_for("step 5/")
        hosts.cut("h2")
        took = wait_until(lambda: not any(ranks(hosts, tmp_path)), END_S, job)
        print(f"{launcher}: all ranks gone {took:.1f} s after the cut")
        assert "no sign of life from rank 1 on h2" in job.log, job.log[-4000:]
        assert any(job.codes(GIVE_UP_S)), job.log[-4000:]
    finally:
        hosts.mend("h2")
        job.stop()
        slurm.rejoin()
