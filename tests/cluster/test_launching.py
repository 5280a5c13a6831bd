"""Every way to start the trainer gives the same run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cluster.hosts import Hosts
from tests.cluster.jobs import Job, arguments, by_pdsh, by_srun, by_torchrun, hostfile
from tests.cluster.slurm import Slurm
from tests.distributed.test_runs import losses

pytestmark = pytest.mark.cluster
STEPS = 3


def commands(form: str, hosts: Hosts, folder: Path, words: list[str], port: int) -> dict[str, list[str]]:
    """What is typed on which host, to start two ranks."""
    script = ["launch/train.sh", *words]
    one_host = ["deepspeed", "--num_gpus", "2", "--master_port", str(port)]
    return {
        "one host": {"h1": [*one_host, *script]},
        "no_python": {"h1": [*one_host[:1], "--no_python", *one_host[1:], *script]},
        "hostfile": by_pdsh(folder, port, script),
        "torchrun": by_torchrun(hosts, port, ["-m", "ilvr_ds.cli", "train", *words]),
        "srun bash": by_srun(["bash", *script]),
    }[form]


def start(form: str, hosts: Hosts, slurm: Slurm, folder: Path, demo: Path, port: int = 29501) -> Job:
    words = arguments(folder, demo, train__max_steps=STEPS)
    more = {**hostfile(folder, hosts), **slurm.environment}
    return Job(hosts, folder, commands(form, hosts, folder, words, port), **more)


def curve(job: Job, folder: Path) -> dict[int, dict[str, float]]:
    """Losses and gradients of each step, once the job has ended well."""
    try:
        assert not any(job.codes()), job.log[-4000:]
    finally:
        job.stop()
    return losses(folder)


def assert_same(found: dict[int, dict[str, float]], expected: dict[int, dict[str, float]]) -> None:
    assert list(found) == list(expected) == list(range(1, STEPS + 1))
    for step, values in expected.items():
        assert found[step] == pytest.approx(values, rel=1e-5, abs=1e-7), step


@pytest.fixture(scope="module")
def expected(
    hosts: Hosts, slurm: Slurm, demo_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, dict[str, float]]:
    """Two ranks on one host."""
    folder = tmp_path_factory.mktemp("one")
    return curve(start("one host", hosts, slurm, folder, demo_folder), folder)


@pytest.mark.parametrize("form", ["no_python", "hostfile", "torchrun", "srun bash"])
def test_a_launch_form_trains_the_same(
    form: str, hosts: Hosts, slurm: Slurm, demo_folder: Path, tmp_path: Path, expected: dict[int, dict[str, float]]
) -> None:
    """Catches ranks that train alone side by side, a hidden host and a master that cannot be reached."""
    assert_same(curve(start(form, hosts, slurm, tmp_path, demo_folder), tmp_path), expected)


def test_two_runs_on_the_same_hosts(
    hosts: Hosts, slurm: Slurm, demo_folder: Path, tmp_path: Path, expected: dict[int, dict[str, float]]
) -> None:
    """Catches ports, files and shared memory that two runs take for their own."""
    folders = [tmp_path / "pdsh", tmp_path / "srun"]
    jobs = [
        start(form, hosts, slurm, folder, demo_folder)
        for form, folder in zip(("hostfile", "srun bash"), folders, strict=True)
    ]
    codes = [job.codes() for job in jobs]  # before anything is stopped
    assert codes == [[0], [0]], [job.log[-4000:] for job in jobs]
    for job, folder in zip(jobs, folders, strict=True):
        assert_same(curve(job, folder), expected)
