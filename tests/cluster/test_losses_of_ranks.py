"""A rank or a link that is lost ends the job on every host, in time and by name, whoever started it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.cluster.hosts import Hosts
from tests.cluster.jobs import PAIR, Job, arguments, by_pdsh, by_srun, by_torchrun, hostfile, stop
from tests.cluster.slurm import Slurm

pytestmark = pytest.mark.cluster
SILENT_S = 15
"""`run.rank_timeout_s` of these runs."""
END_S = 90
"""From the fault to the last process: the time-out, the farewell of the ranks and that of their launchers; more than
twice of what it takes where nothing else runs."""
GIVE_UP_S = 180
"""So long launchers may wait for a host that does not answer: ssh 15 s, Slurm until it has declared the node dead."""
LAUNCHERS = ("pdsh", "torchrun", "srun")


def start(hosts: Hosts, slurm: Slurm, folder: Path, demo: Path, fault: str, at: int) -> dict[str, Job]:
    """Long runs of two ranks, one by each launcher, in which `fault` strikes in step `at`, counted from 1."""
    jobs = {}
    for number, launcher in enumerate(LAUNCHERS):
        place = folder / launcher
        words = arguments(place, demo, train__max_steps=50_000, run__rank_timeout_s=SILENT_S, data__num_workers=1)
        module = ["tests.distributed.faulty", fault, "all", str(at), "train", *words]
        commands = {
            "pdsh": by_pdsh(place, 29520 + number, ["--no_local_rank", "--module", *module]),
            "torchrun": by_torchrun(29520 + number, ["-m", *module]),
            "srun": by_srun(["python3", "-m", *module]),
        }[launcher]
        jobs[launcher] = Job(hosts, place, commands, **hostfile(place), **slurm.environment)
    return jobs


def processes(hosts: Hosts, folder: Path) -> list[int]:
    """Processes of a run on its hosts: ranks, their loader workers, launchers."""
    return [process for name in PAIR for process in hosts.processes(name, f"run.output_dir={folder} ")]


def wait_for_the_end(hosts: Hosts, folder: Path, jobs: dict[str, Job], what: str) -> None:
    """Return when no host has a process of any run any more."""
    begin = time.monotonic()
    left = set(LAUNCHERS)
    while left:
        for launcher in [name for name in left if not processes(hosts, folder / name)]:
            print(f"{launcher}: all ranks gone {time.monotonic() - begin:.1f} s after {what}")
            left.remove(launcher)
        assert time.monotonic() - begin < END_S, [jobs[name].log[-4000:] for name in left]
        time.sleep(0.2)


def test_a_killed_rank_ends_the_job_on_all_hosts(hosts: Hosts, slurm: Slurm, demo_folder: Path, tmp_path: Path) -> None:
    """kill -9 on h2 while rank 0 is outside collectives: pdsh and torchrun alone would wait for ever."""
    jobs = start(hosts, slurm, tmp_path, demo_folder, "killed_alone", at=4)
    try:
        for job in jobs.values():
            job.wait_for("step 3/")
        wait_for_the_end(hosts, tmp_path, jobs, "the last whole step")
        for launcher, job in jobs.items():
            assert any(job.codes(END_S)), job.log[-4000:]
            named = "h2: task 1: Killed" if launcher == "srun" else "no sign of life from rank 1 on h2"
            assert named in job.log, job.log[-4000:]
    finally:
        stop(hosts, *jobs.values())


def test_a_cut_link_ends_the_job_on_both_sides(hosts: Hosts, slurm: Slurm, demo_folder: Path, tmp_path: Path) -> None:
    """Nothing is refused, nothing arrives: each side has only its clock, and Slurm's must not be the first."""
    jobs = start(hosts, slurm, tmp_path, demo_folder, "hanging", at=10**6)
    try:
        for job in jobs.values():
            job.wait_for("step 5/")
        with slurm.patience(4 * SILENT_S):
            hosts.cut("h2")
            wait_for_the_end(hosts, tmp_path, jobs, "the cut")
            for job in jobs.values():
                assert "no sign of life from rank 1 on h2" in job.log, job.log[-4000:]
                assert any(job.codes(GIVE_UP_S)), job.log[-4000:]
    finally:
        hosts.mend("h2")
        stop(hosts, *jobs.values())
        slurm.rejoin()
