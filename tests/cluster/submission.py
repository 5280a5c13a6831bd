"""The scripts of `launch/slurm/`, submitted from a folder that looks like a checkout."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from tests.cluster.hosts import HEAD, Hosts
from tests.cluster.jobs import START_S, arguments, environment
from tests.cluster.slurm import Slurm
from tests.ranks import ROOT

SMALL = ["--nodes=2", "--ntasks-per-node=1", "--gres=none", "--cpus-per-task=1", "--time=20"]
"""What a test's node is asked for instead of 8 GPUs."""
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


def checkout(folder: Path) -> Path:
    """`folder`, with the scripts at their place."""
    folder.mkdir(exist_ok=True)
    (folder / "launch").symlink_to(ROOT / "launch")
    return folder


def sbatch(slurm: Slurm, folder: Path, *words: str) -> str:
    """Submit from `folder` on the head; returns the job's number."""
    command = slurm.hosts.command(HEAD, "env", "-C", str(folder), "sbatch", "--parsable", *words)
    done = subprocess.run(command, env=environment(**slurm.environment), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def wait_for_end(slurm: Slurm, job: str, timeout_s: float = 2 * START_S) -> None:
    """Return when a job, or every job of an array, has completed."""
    deadline = time.monotonic() + timeout_s
    while not all(state in OVER for state in slurm.states(job)):
        assert time.monotonic() < deadline, slurm.run("squeue")
        time.sleep(0.2)


class Training:
    """A job of `train.sbatch`."""

    def __init__(self, slurm: Slurm, folder: Path, demo: Path, *options: str, steps: int, every: int = 0) -> None:
        self.slurm, self.folder = slurm, checkout(folder)
        words = arguments(folder, demo, train__max_steps=steps, checkpoint__every_steps=every, run__rank_timeout_s=60)
        self.submitted = time.monotonic()
        self.id = sbatch(slurm, folder, *SMALL, *options, "launch/slurm/train.sbatch", *words)

    @property
    def log(self) -> str:
        """The job's own log and rank 0's."""
        logs = [self.folder / f"slurm-{self.id}.log", self.folder / f"slurm-{self.id}/rank-0.log"]
        return "\n".join(log.read_text() for log in logs if log.exists())

    @property
    def state(self) -> str:
        return self.slurm.field(self.id, "JobState")

    @property
    def nodes(self) -> list[str]:
        """Where it runs, the host of rank 0 first."""
        return self.slurm.run("scontrol", "show", "hostnames", self.slurm.field(self.id, "NodeList")).split()

    def runs_after(self, restarts: int) -> bool:
        """Whether its ranks may run now, after so many restarts: it says RUNNING also before it is requeued."""
        return self.slurm.fields(self.id, "JobState", "Restarts") == ("RUNNING", str(restarts))

    def starts(self) -> list[str]:
        """Rank 0's log of each start that has begun to train."""
        rank_0 = self.folder / f"slurm-{self.id}/rank-0.log"
        return rank_0.read_text().split(" a step on ")[1:] if rank_0.exists() else []

    def ranks(self, hosts: Hosts) -> dict[str, list[int]]:
        return {name: hosts.processes(name, f"run.output_dir={self.folder} ") for name in hosts.names}

    def wait_for(self, what: Callable[[], bool], timeout_s: float = START_S) -> None:
        deadline = time.monotonic() + timeout_s
        while not what():
            failed = self.state == "FAILED"
            assert not failed and time.monotonic() < deadline, f"{self.state}\n{self.log[-4000:]}"
            time.sleep(0.1)

    def wait_for_a_step(self, restarts: int = 0) -> None:
        """Return when it has trained after so many starts that had got as far as their data."""
        self.wait_for(lambda: re.search(r"step \d+/", "".join(self.starts()[restarts:])) is not None)

    def completes(self, restarts: int) -> None:
        """It ends well after so many restarts."""
        wait_for_end(self.slurm, self.id)
        assert self.state == "COMPLETED", self.log[-4000:]
        assert int(self.slurm.field(self.id, "Restarts")) == restarts, self.log[-4000:]
