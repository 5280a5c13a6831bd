"""One cluster for all tests of this folder: three hosts, with Slurm on them."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.hosts import Hosts, why_not
from tests.cluster.jobs import environment
from tests.cluster.slurm import Slurm
from tests.ranks import ROOT


@pytest.fixture(scope="session", autouse=True)
def path() -> Iterator[None]:
    """Root's own tools."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", "/usr/sbin:/sbin", prepend=":")
        yield


@pytest.fixture(scope="session")
def hosts(path: None) -> Iterator[Hosts]:
    """`head`, `h1`, `h2`, `h3`; the tests are skipped with a printed reason where there can be none.

    Most jobs use two of them; the third is the one that differs, or takes over.
    """
    if reason := why_not():
        pytest.skip(f"no cluster on this machine: {reason}")
    with tempfile.TemporaryDirectory(prefix="ilvr-hosts-") as folder:
        Path(folder).chmod(0o755)  # munge wants to own its way
        _compile()
        hosts = Hosts(Path(folder), 3)
        yield hosts
        hosts.close()


@pytest.fixture(scope="session")
def slurm(hosts: Hosts) -> Slurm:
    return Slurm(hosts)


def _compile() -> None:
    """Operators, once for all tests: they measure how long a start takes where somebody has compiled before."""
    program = "from ilvr_ds.ops import build; build.load()"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT, env=environment())
