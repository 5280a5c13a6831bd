"""Every way to start the trainer gives the same run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cluster.hosts import Hosts
from tests.cluster.jobs import Job, arguments, forms, hostfile
from tests.cluster.slurm import Slurm
from tests.distributed.test_runs import losses

pytestmark = pytest.mark.cluster
STEPS = 3


def train(form: str, hosts: Hosts, slurm: Slurm, folder: Path, demo: Path) -> dict[int, dict[str, float]]:
    words = arguments(folder, demo, train__max_steps=STEPS)
    more = {**hostfile(folder, hosts), **slurm.environment}
    job = Job(hosts, folder, forms(hosts, folder, words, 29501)[form], **more)
    try:
        codes = job.codes()
        assert not any(codes), job.log[-4000:]
    finally:
        job.stop()
    return losses(folder)


@pytest.fixture(scope="module")
def expected(
    hosts: Hosts, slurm: Slurm, demo_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, dict[str, float]]:
    """Two ranks on one host."""
    return train("one host", hosts, slurm, tmp_path_factory.mktemp("one"), demo_folder)


@pytest.mark.parametrize("form", ["no_python", "hostfile", "torchrun", "srun", "srun ilvr-ds"])
def test_a_launch_form_trains_the_same(
    form: str, hosts: Hosts, slurm: Slurm, demo_folder: Path, tmp_path: Path, expected: dict[int, dict[str, float]]
) -> None:
    """Catches ranks that train alone side by side, a hidden host and a master that cannot be reached."""
    found = train(form, hosts, slurm, tmp_path, demo_folder)
    assert list(found) == list(expected) == list(range(1, STEPS + 1))
    for step, values in expected.items():
        assert found[step] == pytest.approx(values, rel=1e-5, abs=1e-7), step
