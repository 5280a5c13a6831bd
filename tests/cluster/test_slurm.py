"""`launch/slurm/train.sbatch`, from submission to its end, and whatever a cluster does to it meanwhile."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest
import torch

from tests.cluster.hosts import HEAD, Hosts
from tests.cluster.jobs import environment
from tests.cluster.slurm import Slurm
from tests.cluster.submission import Training, checkout, sbatch
from tests.distributed.test_runs import losses
from tests.ranks import ROOT

pytestmark = pytest.mark.cluster
STEPS = 120
"""Some seconds of training: there is time to disturb it, four times."""
EVERY = 20
"""Steps between two checkpoints."""


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


def checkpoints(folder: Path) -> set[str]:
    """Names of the whole ones."""
    return {state.parent.name for state in (folder / "demo/checkpoints").glob("step-????????/state.json")}


@pytest.fixture(scope="module")
def undisturbed(slurm: Slurm, demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a job that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    job = Training(slurm, folder, demo_folder, steps=STEPS, every=EVERY)
    job.wait_for_a_step()
    print(f"submission to the first steps: {time.monotonic() - job.submitted:.1f} s")
    job.completes(restarts=0)
    return folder


def test_a_job_completes(undisturbed: Path) -> None:
    """From sbatch to COMPLETED on two nodes; every rank has a log."""
    assert max(losses(undisturbed)) == STEPS
    assert len(list(undisturbed.glob("slurm-*/rank-?.log"))) == 2


def test_a_job_ends_as_if_nothing_had_happened(
    slurm: Slurm, hosts: Hosts, undisturbed: Path, demo_folder: Path, tmp_path: Path
) -> None:
    """One job meets, one after the other: the signal before its limit while it trains and while it starts; preemption
    by a higher partition; the death of a node, whose place a spare one takes."""
    job = Training(slurm, tmp_path, demo_folder, steps=STEPS, every=EVERY)

    job.wait_for_a_step()
    slurm.run("scancel", "--batch", "--signal=USR1", job.id)  # as --signal=B:USR1@300 does: to the script

    job.wait_for(lambda: job.runs_after(restarts=1))
    job.wait_for(lambda: bool(job.ranks(hosts)[job.nodes[1]]))
    slurm.run("scancel", "--batch", "--signal=USR1", job.id)  # Python has hardly begun: nothing is there to be saved

    job.wait_for_a_step(restarts=1)
    everything = ["--partition=high", f"--nodes={len(hosts.names)}", "--exclusive"]
    urgent = sbatch(slurm, tmp_path, *everything, "--wrap", "sleep 1")
    job.wait_for(lambda: slurm.states(urgent) == ["COMPLETED"])

    job.wait_for_a_step(restarts=2)
    saved = checkpoints(tmp_path)
    job.wait_for(lambda: not checkpoints(tmp_path) <= saved)
    *_, victim = nodes = job.nodes
    hosts.kill(victim)
    died = time.monotonic()
    try:
        job.wait_for(lambda: slurm.field(job.id, "Restarts") == "4")
        job.wait_for_a_step(restarts=3)
        print(f"death of a node to the first step after the restart: {time.monotonic() - died:.1f} s")
        assert job.nodes != nodes
    finally:
        hosts.boot(victim)
        slurm.boot(victim)

    job.completes(restarts=4)
    assert "".join(job.starts()).count("going on from ") == 3, "one start was over before it had read anything"
    assert_same_end(tmp_path, undisturbed)
    slurm.wait_for_nodes()


def test_a_killed_rank_fails_the_job(slurm: Slurm, hosts: Hosts, demo_folder: Path, tmp_path: Path) -> None:
    """Catches a script that waits for a dead node where none is, or starts a faulty run again and again."""
    job = Training(slurm, tmp_path, demo_folder, steps=5000)
    job.wait_for_a_step()
    name = job.nodes[1]
    hosts.run(name, "kill", "-9", *map(str, job.ranks(hosts)[name]))
    deadline = time.monotonic() + 90
    while job.state == "RUNNING":
        assert time.monotonic() < deadline, job.log[-4000:]
        time.sleep(0.2)
    assert job.state == "FAILED"
    assert f"{name}: task 1: Killed" in job.log


def test_scancel_leaves_nothing_behind(slurm: Slurm, hosts: Hosts, demo_folder: Path, tmp_path: Path) -> None:
    """No process on any host, and no requeue: the ranks' exit code looks like that of a preemption."""
    job = Training(slurm, tmp_path, demo_folder, steps=5000)
    job.wait_for_a_step()
    assert sum(map(bool, job.ranks(hosts).values())) == 2
    slurm.run("scancel", job.id)
    job.wait_for(lambda: not any(job.ranks(hosts).values()), 60)
    time.sleep(2)  # a requeue would show by now
    assert job.state == "CANCELLED"
    assert not any(hosts.processes(name, "slurmstepd: [") for name in hosts.names)


@pytest.mark.parametrize("script", ["train", "evaluate", "sweep", "encode"])
def test_the_scripts_are_accepted_as_they_are(script: str, slurm: Slurm, tmp_path: Path) -> None:
    """Nodes of 8 GPUs, by --test-only and for good: catches options that contradict each other or do not exist."""
    command = slurm.hosts.command(HEAD, "sbatch", "--test-only", f"launch/slurm/{script}.sbatch")
    done = subprocess.run(command, cwd=ROOT, env=environment(**slurm.environment), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "to start at" in done.stderr
    job = sbatch(slurm, checkout(tmp_path), "--hold", f"launch/slurm/{script}.sbatch")
    assert slurm.field(job, "TresPerNode") == ("gres:gpu:1" if script == "encode" else "gres:gpu:8")
    slurm.run("scancel", job)
