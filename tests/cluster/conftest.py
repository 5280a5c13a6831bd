"""One cluster for all tests of this folder: two hosts, with Slurm on them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.hosts import Hosts, why_not
from tests.cluster.slurm import Slurm


@pytest.fixture(scope="session", autouse=True)
def path() -> Iterator[None]:
    """Root's own tools."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", "/usr/sbin:/sbin", prepend=":")
        yield


@pytest.fixture(scope="session")
def hosts(path: None) -> Iterator[Hosts]:
    """`head`, `h1`, `h2`; the tests are skipped with a printed reason where there can be none."""
    if reason := why_not():
        pytest.skip(f"no cluster on this machine: {reason}")
    with tempfile.TemporaryDirectory(prefix="ilvr-hosts-") as folder:
        Path(folder).chmod(0o755)  # munge wants to own its way
        hosts = Hosts(Path(folder), 2)
        yield hosts
        hosts.close()


@pytest.fixture(scope="session")
def slurm(hosts: Hosts) -> Slurm:
    return Slurm(hosts)
