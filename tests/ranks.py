"""Runs functions of the test suite on real ranks: one process each, gloo between them.

Starting a rank costs far more than what most tests do on it (imports), so ranks stay up for the next call; after a
failure or a hang they are ended and the next call starts fresh ones.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import os
import signal
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch

from tests.forks import ROOT, Fork


def run_ranks(
    function: str, world: int, folder: Path, timeout_s: float = 240, is_fresh: bool = False, **arguments: Any
) -> list[Any]:
    """Call `function` ("tests.distributed.workers:name") with `arguments` on `world` ranks; returns their results.

    is_fresh: ranks that no test used before, and that none uses after. A rank that fails, or no end after `timeout_s`,
    fails the test with the last output of every rank.
    """
    if is_fresh and world in _teams:  # an engine of a test before leaves DeepSpeed's ZeRO-3 linear in torch
        _teams.pop(world).stop()
    if world not in _teams:
        _teams[world] = _Team.start(world, folder)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"function": function, "arguments": arguments}, folder / "call.pt")
    try:
        results = _teams[world].call(folder, timeout_s)
    except BaseException:
        _teams.pop(world).stop()
        raise
    if is_fresh:
        _teams.pop(world).stop()
    return results


@dataclass
class _Team:
    """Ranks that wait for calls."""

    ranks: list[Fork]
    logs: list[Path]

    @staticmethod
    def start(world: int, folder: Path) -> _Team:
        folder.mkdir(parents=True, exist_ok=True)
        port = free_port()
        logs = [folder / f"rank-{rank}.log" for rank in range(world)]
        ranks = [
            Fork("tests.ranks", env=rank_environment(rank, world, port), out=log, has_input=True)
            for rank, log in enumerate(logs)
        ]
        return _Team(ranks, logs)

    def call(self, folder: Path, timeout_s: float) -> list[Any]:
        results = [folder / f"result-{rank}.pt" for rank in range(len(self.ranks))]
        for result in results:
            result.unlink(missing_ok=True)  # of an earlier call with the same folder
        for process in self.ranks:
            process.send(str(folder))
        deadline = time.monotonic() + timeout_s
        while not all(result.exists() for result in results):
            codes = [process.poll() for process in self.ranks]
            assert codes == [None] * len(codes), self._report(f"exit codes {codes}")
            assert time.monotonic() < deadline, self._report(f"no end after {timeout_s} s")
            time.sleep(0.02)
        return [torch.load(result, weights_only=False) for result in results]

    def stop(self) -> None:
        for process in self.ranks:
            process.kill()
            process.wait()

    def _report(self, what: str) -> str:
        return "\n".join([what, *(f"--- rank {r} ---\n{log.read_text()[-4000:]}" for r, log in enumerate(self.logs))])


_teams: dict[int, _Team] = {}
_destroyed: WeakSet[Any] = WeakSet()
"""Engines of this rank's earlier calls, of which something may still hold the rest"""
_stores: list[Any] = []
"""Of the watches of earlier calls"""


@atexit.register
def _stop_all() -> None:
    for team in _teams.values():
        team.stop()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def heeding_ctrl_c() -> None:
    """In a new process: Ctrl-C as in a terminal, also where a shell that started the tests ignores it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start_ranks(world: int, folder: Path, *arguments: str) -> list[Fork]:
    """A module with its arguments on each rank of a job, without a launcher; it writes to `folder`/log-RANK."""
    folder.mkdir(exist_ok=True)
    port, ranks = free_port(), range(world)
    return [Fork(*arguments, env=rank_environment(n, world, port), out=folder / f"log-{n}") for n in ranks]


def rank_environment(rank: int, world: int, port: int) -> dict[str, str]:
    """What a launcher would set; one thread for each rank, because ranks share the cores."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_SIZE": world, "MASTER_PORT": port}
    fixed = {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    return {**os.environ, **{name: str(value) for name, value in names.items()}, **fixed}


def _serve() -> None:
    """Answer calls until standard input ends."""
    for line in sys.stdin:
        folder = Path(line.strip())
        call = torch.load(folder / "call.pt", weights_only=False)
        module, _, name = call["function"].partition(":")
        if module not in sys.modules:
            importlib.import_module(module)
            gc.freeze()  # a million objects that stay: looked through after each call they cost seconds
        result = getattr(sys.modules[module], name)(**call["arguments"])
        part = folder / f"part-{os.environ['RANK']}.pt"
        torch.save(result, part)
        del result
        _end_what_is_left()
        part.rename(folder / f"result-{os.environ['RANK']}.pt")


def _end_what_is_left() -> None:
    """DeepSpeed's hooks keep an engine alive with its buckets of gradients, 0.4 to 0.8 GB of addresses; a process with
    more addresses than the machine has memory cannot fork. A run's watch ends this process when nothing has moved for
    `run.stall_timeout_s`."""
    from ilvr_ds.monitoring.watchdog import Watchdog

    engine = sys.modules["deepspeed"].DeepSpeedEngine
    for one in [thing for thing in gc.get_objects() if isinstance(thing, (engine, Watchdog))]:
        if isinstance(one, Watchdog):
            one.leave()
            _stores.append(one._store)  # another rank's watch may still be speaking to this rank's
        elif one not in _destroyed:
            one.destroy()
            _destroyed.add(one)
    gc.collect()


if __name__ == "__main__":
    _serve()
