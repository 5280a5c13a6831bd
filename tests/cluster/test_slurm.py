"""`launch/slurm/train.sbatch`, from submission to its end, and whatever a cluster does to it meanwhile."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.cluster.hosts import HEAD, Hosts
from tests.cluster.jobs import START_S, arguments, environment
from tests.cluster.slurm import Slurm
from tests.distributed.test_runs import losses
from tests.ranks import ROOT

pytestmark = pytest.mark.cluster
STEPS = 60
SMALL = ["--nodes=2", "--ntasks-per-node=1", "--gres=none", "--cpus-per-task=1", "--time=20"]
"""What a test's node is asked for instead of 8 GPUs."""


class Submitted:
    """A job of the script, in a folder that looks like a checkout."""

    def __init__(self, slurm: Slurm, folder: Path, demo: Path, *options: str, steps: int = STEPS) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "launch").symlink_to(ROOT / "launch")
        self.slurm, self.folder = slurm, folder
        words = arguments(folder, demo, train__max_steps=steps, checkpoint__every_steps=20, run__rank_timeout_s=60)
        self.submitted = time.monotonic()
        self.id = sbatch(slurm, folder, *SMALL, *options, "launch/slurm/train.sbatch", *words)

    @property
    def log(self) -> str:
        """The job's own log and rank 0's."""
        logs = [self.folder / f"slurm-{self.id}.log", self.folder / f"slurm-{self.id}/rank-0.log"]
        return "\n".join(log.read_text() for log in logs if log.exists())

    def wait_for(self, what: Callable[[], bool], timeout_s: float = START_S) -> None:
        deadline = time.monotonic() + timeout_s
        while not what():
            failed = self.slurm.state(self.id) == "FAILED"
            assert not failed and time.monotonic() < deadline, f"{self.slurm.state(self.id)}\n{self.log[-4000:]}"
            time.sleep(0.2)

    def wait_for_step(self, step: int) -> None:
        self.wait_for(lambda: f"step {step}/" in self.log)

    def completes(self, restarts: int) -> None:
        """It ends well after so many restarts."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self.wait_for(lambda: self.slurm.state(self.id) in over, 2 * START_S)
        assert self.slurm.state(self.id) == "COMPLETED", self.log[-4000:]
        assert int(self.slurm.field(self.id, "Restarts")) == restarts, self.log[-4000:]
        assert self.log.count("going on from ") == restarts


def sbatch(slurm: Slurm, folder: Path, *words: str) -> str:
    """Submit from `folder` on the head; returns the job's number."""
    command = slurm.hosts.command(HEAD, "env", "-C", str(folder), "sbatch", "--parsable", *words)
    done = subprocess.run(command, env=environment(**slurm.environment), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def assert_same_end(found: Path, expected: Path) -> None:
    """Bitwise the same weights, moments and teacher in the last checkpoint, and the same losses."""
    folders = [folder / f"demo/checkpoints/step-{STEPS:08}" for folder in (found, expected)]
    files = [sorted(path.relative_to(folder) for path in folder.rglob("*optim_states.pt")) for folder in folders]
    assert files[0] == files[1] and files[0]
    for file in files[0]:
        stored = [torch.load(folder / file, weights_only=False)["optimizer_state_dict"] for folder in folders]
        assert torch.equal(*(state["fp32_flat_groups"][0] for state in stored))
        moments = [state["optimizer_state_dict"]["state"][0] for state in stored]
        assert all(torch.equal(moments[0][key], moments[1][key]) for key in ("exp_avg", "exp_avg_sq"))
    for rank in range(2):
        name = f"teacher-rank-{rank:05d}.safetensors"
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    assert losses(found) == losses(expected)


def ranks(hosts: Hosts, job: Submitted) -> dict[str, list[int]]:
    return {name: hosts.processes(name, f"run.output_dir={job.folder}") for name in hosts.names}


@pytest.fixture(scope="module")
def undisturbed(slurm: Slurm, demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a job that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    job = Submitted(slurm, folder, demo_folder)
    job.wait_for_step(1)
    print(f"submission to the first steps: {time.monotonic() - job.submitted:.1f} s")
    job.completes(restarts=0)
    return folder


def test_a_job_completes(undisturbed: Path) -> None:
    """From sbatch to COMPLETED on two nodes; every rank has a log."""
    assert max(losses(undisturbed)) == STEPS
    assert len(list(undisturbed.glob("slurm-*/rank-?.log"))) == 2


def test_the_signal_before_the_limit_saves_and_requeues(
    slurm: Slurm, undisturbed: Path, demo_folder: Path, tmp_path: Path
) -> None:
    """As --signal=USR1@300 sends it, to the ranks and not to the script."""
    job = Submitted(slurm, tmp_path, demo_folder)
    job.wait_for_step(5)
    slurm.run("scancel", "--signal=USR1", job.id)
    job.completes(restarts=1)
    assert_same_end(tmp_path, undisturbed)


def test_preemption_saves_and_requeues(slurm: Slurm, undisturbed: Path, demo_folder: Path, tmp_path: Path) -> None:
    """A job of a higher partition takes the nodes, runs, and gives them back."""
    job = Submitted(slurm, tmp_path, demo_folder)
    job.wait_for_step(5)
    urgent = sbatch(slurm, tmp_path, "--partition=high", "--nodes=2", "--exclusive", "--wrap", "sleep 1")
    job.wait_for(lambda: slurm.state(urgent) == "COMPLETED")
    job.completes(restarts=1)
    assert_same_end(tmp_path, undisturbed)


def test_the_death_of_a_node_requeues(
    slurm: Slurm, hosts: Hosts, undisturbed: Path, demo_folder: Path, tmp_path: Path
) -> None:
    job = Submitted(slurm, tmp_path, demo_folder)
    job.wait_for(lambda: (tmp_path / "demo/checkpoints/step-00000020/state.json").exists())
    hosts.kill("h2")
    died = time.monotonic()
    try:
        job.wait_for(lambda: slurm.state(job.id) == "PENDING")
    finally:
        hosts.boot("h2")
        slurm.boot("h2")
    job.wait_for(lambda: re.search(r"going on from .*step \d+/", job.log, re.DOTALL) is not None)
    print(f"death of a node to the first step after the restart: {time.monotonic() - died:.1f} s")
    job.completes(restarts=1)
    assert_same_end(tmp_path, undisturbed)


def test_a_killed_rank_fails_the_job(slurm: Slurm, hosts: Hosts, demo_folder: Path, tmp_path: Path) -> None:
    """Catches a script that waits for a dead node where none is, or starts a faulty run again and again."""
    job = Submitted(slurm, tmp_path, demo_folder, steps=5000)
    job.wait_for_step(5)
    hosts.run("h2", "kill", "-9", *map(str, ranks(hosts, job)["h2"]))
    deadline = time.monotonic() + 60
    while slurm.state(job.id) == "RUNNING":
        assert time.monotonic() < deadline, job.log[-4000:]
        time.sleep(0.2)
    assert slurm.state(job.id) == "FAILED"
    assert "h2: task 1: Killed" in job.log


def test_scancel_leaves_nothing_behind(slurm: Slurm, hosts: Hosts, demo_folder: Path, tmp_path: Path) -> None:
    """No process on any host, and no requeue: the ranks' exit code looks like that of a preemption."""
    job = Submitted(slurm, tmp_path, demo_folder, steps=5000)
    job.wait_for_step(5)
    assert all(ranks(hosts, job).values())
    slurm.run("scancel", job.id)
    job.wait_for(lambda: not any(ranks(hosts, job).values()), 30)
    time.sleep(2)  # a requeue would show by now
    assert slurm.state(job.id) == "CANCELLED"
    assert not any(hosts.processes(name, "slurmstepd: [") for name in hosts.names)


@pytest.mark.parametrize("script", ["train", "evaluate", "sweep"])
def test_the_scripts_are_accepted_as_they_are(script: str, slurm: Slurm, tmp_path: Path) -> None:
    """Nodes of 8 GPUs, by --test-only and for good: catches options that contradict each other or do not exist."""
    command = slurm.hosts.command(HEAD, "sbatch", "--test-only", f"launch/slurm/{script}.sbatch")
    done = subprocess.run(command, cwd=ROOT, env=environment(**slurm.environment), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "to start at" in done.stderr
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    job = sbatch(slurm, tmp_path, "--hold", f"launch/slurm/{script}.sbatch")
    assert slurm.field(job, "TresPerNode") == "gres:gpu:8"
    slurm.run("scancel", job)
