"""Modules run as processes of their own that start at once: forked from one that has imported what they need.

What a rank imports takes five seconds of a core, more than what most tests do on it. A process of these differs from
`python -m MODULE` in that alone, and in that what it registers with `atexit` is not called at its end. It leads a
session, has its own environment, output and exit code, and may be killed.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from multiprocessing.connection import Connection
from multiprocessing.forkserver import ensure_running
from pathlib import Path

ROOT = Path(__file__).parent.parent
IMPORTED = "tests.imported"


class Fork:
    """A running module; what tests use of `subprocess.Popen`."""

    def __init__(
        self, module: str, *arguments: str, env: Mapping[str, str], out: Path, err: Path | None = None,
        cwd: Path = ROOT, has_input: bool = False,
    ) -> None:  # fmt: skip
        """Start it; `out` and `err` are files, `err` is `out` by default. has_input: `send` will be called."""
        reader, self._writer = _context().Pipe(duplex=False) if has_input else (None, None)
        arguments_of = (module, arguments, dict(env), out, err, cwd, reader)
        self._process = _context().Process(target=_become, args=arguments_of)
        self._process.start()
        if reader is not None:
            reader.close()
        self.pid = self._process.pid or 0

    def send(self, line: str) -> None:
        """A line on its standard input."""
        assert self._writer is not None
        os.write(self._writer.fileno(), line.encode() + b"\n")

    def poll(self) -> int | None:
        """The exit code, minus the number of the signal that ended it; None as long as it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, once it has ended.

        Raises:
            subprocess.TimeoutExpired: it has not ended after `timeout` seconds.
        """
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(str(self._process), timeout or 0.0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """To this process alone, where it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()


def run(
    module: str, *arguments: str, env: Mapping[str, str] | None = None, cwd: Path = ROOT, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """What the module printed and its exit code, as of `subprocess.run(capture_output=True, text=True)`.

    Raises:
        subprocess.TimeoutExpired: it had not ended after `timeout` seconds; it was killed.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        process = Fork(module, *arguments, env=os.environ if env is None else env, out=out, err=err, cwd=cwd)
        try:
            code = process.wait(timeout)
        finally:
            process.kill()
        return subprocess.CompletedProcess([module, *arguments], code, out.read_text(), err.read_text())


def _context() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([IMPORTED])
    here = Path.cwd()
    os.chdir(ROOT)  # from where the server imports; a test may have gone elsewhere
    try:
        ensure_running()
    finally:
        os.chdir(here)
    return context


def _become(
    module: str, arguments: tuple[str, ...], env: dict[str, str], out: Path, err: Path | None, cwd: Path,
    reader: Connection | None,
) -> None:  # fmt: skip
    assert "deepspeed" in sys.modules, f"the server could not import {IMPORTED}, and did not say so"
    multiprocessing.set_start_method(None, force=True)  # the default, as where nothing was chosen
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for number, file in ((1, out), (2, err or out)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    if reader is not None:
        os.dup2(reader.fileno(), 0)
        sys.stdin = open(0)  # noqa: SIM115 - multiprocessing has put /dev/null there
    if "OMP_NUM_THREADS" in env:
        sys.modules["torch"].set_num_threads(int(env["OMP_NUM_THREADS"]))
    sys.argv = [module, *arguments]
    sys.path.insert(0, str(cwd))  # as -m does
    runpy.run_module(module, run_name="__main__", alter_sys=True)
