"""Every way to start the trainer gives the same run, also beside another run on the same hosts."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cluster.hosts import Hosts
from tests.cluster.jobs import Job, arguments, by_pdsh, by_srun, by_torchrun, hostfile, stop
from tests.cluster.slurm import Slurm
from tests.distributed.test_runs import losses

pytestmark = pytest.mark.cluster
STEPS = 3
Curve = dict[int, dict[str, float]]


def commands(form: str, folder: Path, words: list[str], port: int) -> dict[str, list[str]]:
    """What is typed on which host; two ranks, but one of the last two forms, which start no others."""
    script = ["launch/train.sh", *words]
    one_host = ["deepspeed", "--num_gpus", "2", "--master_port", str(port)]
    alone = ["--set", "train.micro_batch_size=8"]  # the same samples in a step
    return {
        "one host": {"h1": [*one_host, *script]},
        "no_python": {"h2": [*one_host[:1], "--no_python", *one_host[1:], *script]},
        "hostfile": by_pdsh(folder, port, script),
        "torchrun": by_torchrun(port, ["-m", "ilvr_ds.cli", "train", *words]),
        "srun bash": by_srun(["bash", *script]),
        "bash": {"h1": ["bash", *script, *alone]},
        "alone": {"h2": ["ilvr-ds", "train", *words, *alone]},
    }[form]


def start(form: str, hosts: Hosts, slurm: Slurm, folder: Path, demo: Path, port: int = 29501) -> Job:
    words = arguments(folder, demo, train__max_steps=STEPS)
    return Job(hosts, folder, commands(form, folder, words, port), **hostfile(folder), **slurm.environment)


def curves(jobs: dict[Path, Job], hosts: Hosts) -> list[Curve]:
    """Losses and gradients of each step, once all jobs have ended well."""
    try:
        codes = [job.codes() for job in jobs.values()]  # of all, before anything is stopped
        assert not any(map(any, codes)), [job.log[-4000:] for job in jobs.values()]
    finally:
        stop(hosts, *jobs.values())
    return [losses(folder) for folder in jobs]


@pytest.fixture(scope="module")
def expected(hosts: Hosts, slurm: Slurm, demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Curve:
    """Two ranks on one host."""
    folder = tmp_path_factory.mktemp("one")
    [curve] = curves({folder: start("one host", hosts, slurm, folder, demo_folder)}, hosts)
    assert list(curve) == list(range(1, STEPS + 1))
    return curve


@pytest.mark.parametrize(
    "forms", [("hostfile", "srun bash"), ("torchrun", "no_python"), ("bash", "alone")], ids="+".join
)
def test_launch_forms_train_the_same_side_by_side(
    forms: tuple[str, str], hosts: Hosts, slurm: Slurm, demo_folder: Path, tmp_path: Path, expected: Curve
) -> None:
    """Catches ranks that train alone without knowing, a hidden host, a master that cannot be reached; and ports, files
    and shared memory that two runs take for their own."""
    jobs = {
        folder: start(form, hosts, slurm, folder, demo_folder, port)
        for form, port in zip(forms, (29501, 29511), strict=True)
        for folder in [tmp_path / form.replace(" ", "-")]
    }
    for form, curve in zip(forms, curves(jobs, hosts), strict=True):
        assert list(curve) == list(expected), form
        for step, values in expected.items():
            assert curve[step] == pytest.approx(values, rel=1e-5, abs=1e-7), (form, step)
