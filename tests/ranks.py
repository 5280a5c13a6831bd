"""Runs a function of the test suite on real ranks: one process each, gloo between them."""

from __future__ import annotations

import importlib
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def rank_environment(rank: int, world: int, port: int) -> dict[str, str]:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_SIZE": world, "MASTER_PORT": port}
    fixed = {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    return {**os.environ, **{name: str(value) for name, value in names.items()}, **fixed}


def run_ranks(function: str, world: int, folder: Path, timeout_s: float = 240, **arguments: Any) -> list[Any]:
    """Call `function` ("tests.distributed.workers:name") with `arguments` on `world` ranks; returns their results.

    All ranks are ended when one fails or the time is over: a hang is a failure with every rank's output in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(arguments, folder / "arguments.pt")
    port = free_port()
    logs = [(folder / f"rank-{rank}.log").open("w") for rank in range(world)]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.ranks", function, str(folder)],
            env=rank_environment(rank, world, port), cwd=ROOT, stdout=logs[rank], stderr=subprocess.STDOUT,
        )
        for rank in range(world)
    ]  # fmt: skip
    deadline = time.monotonic() + timeout_s
    try:
        while any(p.poll() is None for p in ranks) and not any(p.poll() for p in ranks):
            assert time.monotonic() < deadline, _report(folder, world, f"no end after {timeout_s} s")
            time.sleep(0.05)
        codes = [p.poll() for p in ranks]
        assert codes == [0] * world, _report(folder, world, f"exit codes {codes}")
    finally:
        for process in ranks:
            process.kill()
            process.wait()
        for log in logs:
            log.close()
    return [torch.load(folder / f"result-{rank}.pt", weights_only=False) for rank in range(world)]


def _report(folder: Path, world: int, what: str) -> str:
    tails = [f"--- rank {r} ---\n" + (folder / f"rank-{r}.log").read_text()[-4000:] for r in range(world)]
    return "\n".join([what, *tails])


def _main(function: str, folder: Path) -> None:
    module, _, name = function.partition(":")
    result = getattr(importlib.import_module(module), name)(**torch.load(folder / "arguments.pt", weights_only=False))
    torch.save(result, folder / f"result-{os.environ['RANK']}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    _main(sys.argv[1], Path(sys.argv[2]))
