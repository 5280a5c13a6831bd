"""Small trainings of the demo, started on the hosts in the ways that users start them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.utils.cpp_extension import get_default_build_root

from tests.cluster.hosts import Hosts
from tests.distributed.test_runs import overrides
from tests.ranks import ROOT
from tests.recipes import RECIPE

BIN = Path(sys.executable).parent
START_S = 300
"""From nothing to the first steps: 20 s on two idle cores, more where others compute too."""
PAIR = ("h1", "h2")
"""The hosts of a job."""
BUILDS = Path(get_default_build_root()) / f"py{sys.version_info.major}{sys.version_info.minor}_cpu"
"""Where the other tests of a machine without GPUs had DeepSpeed's operators compiled already."""


def arguments(folder: Path, demo: Path, **changes: Any) -> list[str]:
    """Of `ilvr-ds train` for a few steps; `folder` gets the run."""
    settings = overrides(folder, demo, **{"train__grad_accum_steps": 1, **changes})
    return ["--config", RECIPE, *(word for value in settings for word in ("--set", value))]


def environment(**more: str) -> dict[str, str]:
    """What a user exports: this checkout and this Python, on the CPU, one thread a rank."""
    fixed = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    fixed["TORCH_EXTENSIONS_DIR"] = str(BUILDS)
    path = os.environ["PATH"]
    return {**os.environ, **fixed, "PATH": path if path.startswith(f"{BIN}:") else f"{BIN}:{path}", **more}


def hostfile(folder: Path, slots: int = 1) -> dict[str, str]:
    """Writes `folder`/hosts and the variables that deepspeed takes to other hosts; returns what names the latter."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "hosts").write_text("".join(f"{name} slots={slots}\n" for name in PAIR))
    names = ("PATH", "DS_ACCELERATOR", "OMP_NUM_THREADS", "TORCH_EXTENSIONS_DIR")
    (folder / "deepspeed_env").write_text("".join(f"{name}={environment()[name]}\n" for name in names))
    return {"DS_ENV_FILE": str(folder / "deepspeed_env")}


class Job:
    """Commands that run on hosts, all into one log."""

    def __init__(self, hosts: Hosts, folder: Path, commands: dict[str, list[str]], **more: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.hosts, self.log_file, self.commands = hosts, folder / "log", commands
        with self.log_file.open("a") as log:
            self.processes = [
                subprocess.Popen(hosts.command(host, *command), cwd=ROOT, env=environment(**more), text=True,
                                 stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
                for host, command in commands.items()
            ]  # fmt: skip

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    def wait_for(self, text: str, timeout_s: float = START_S) -> None:
        """Return when the log holds `text`; the job must be running."""
        deadline = time.monotonic() + timeout_s
        while text not in self.log:
            assert not any(process.poll() for process in self.processes), self.log[-4000:]
            assert time.monotonic() < deadline, self.log[-4000:]
            time.sleep(0.1)

    def codes(self, timeout_s: float = START_S) -> list[int]:
        """Exit codes, once all commands have ended."""
        deadline = time.monotonic() + timeout_s
        try:
            return [process.wait(max(0.1, deadline - time.monotonic())) for process in self.processes]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"no end after {timeout_s} s:\n{self.log[-4000:]}") from None


def stop(hosts: Hosts, *jobs: Job) -> None:
    """End whatever is left of all jobs, on the hosts too."""
    for name in hosts.names:
        for process in hosts.processes(name, str(ROOT)):
            subprocess.run(hosts.command(name, "kill", "-9", str(process)), capture_output=True)
    for job in jobs:
        for process in job.processes:
            process.kill()
            process.wait()


def by_pdsh(folder: Path, port: int, program: list[str]) -> dict[str, list[str]]:
    """DeepSpeed's launcher on h1, which starts the other host's through pdsh."""
    return {"h1": ["deepspeed", "--hostfile", str(folder / "hosts"), "--master_port", str(port), *program]}


def by_torchrun(port: int, program: list[str]) -> dict[str, list[str]]:
    """One torchrun a host."""
    torchrun = ["torchrun", f"--nnodes={len(PAIR)}", "--nproc-per-node=1"]
    master = ["--master-addr=h1", f"--master-port={port}"]
    return {name: [*torchrun, *master, f"--node-rank={rank}", *program] for rank, name in enumerate(PAIR)}


def by_srun(program: list[str], hosts: Sequence[str] = PAIR, tasks: int = 2) -> dict[str, list[str]]:
    """Tasks spread over the hosts, the last of which may have fewer."""
    place = [f"--nodelist={','.join(hosts)}", f"--nodes={len(hosts)}", f"--ntasks={tasks}"]
    place += [f"--ntasks-per-node={-(-tasks // len(hosts))}", "--cpus-per-task=1"]
    return {"head": ["srun", *place, "--kill-on-bad-exit=1", "--unbuffered", *program]}
