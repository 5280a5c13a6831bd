"""MLflow's pages from this machine: starts a small server and prints the address of the charts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from ilvr_ds.ctrl_c import signals_as_ctrl_c
from ilvr_ds.errors import UserError, nearest
from ilvr_ds.tracking.mlflow_state import CopyState, read_state
from ilvr_ds.tracking.names import sqlite_path, without_password
from ilvr_ds.tracking.tracker import charts_page
from ilvr_ds.tracking.ui_address import LOOPBACK, UiAddress

START_S = 120.0
_SETTINGS = {
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # otherwise fifteen processes and half a minute to start
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


def show(root: Path, experiment: str | None, port: int, say: Callable[[str], None], host: str = LOOPBACK) -> int:
    """Serve the store of the runs below `root` on `host` until Ctrl-C or SIGTERM, then return 0.

    Prints the address of the charts of `experiment` (None: the newest run's) once the server answers, and how it is
    reached over ssh, or a warning where others reach it. Raises UserError if full MLflow is not installed, there is
    nothing to show, `host` is not this machine's or the port is taken.
    """
    state = newest(root, experiment)
    if state.uri.startswith(("http://", "https://")):
        say(f"this experiment's server: {charts_page(state.uri, state.experiment_id)}")
        return 0
    if (store := sqlite_path(state.uri)) and not store.is_file():  # MLflow would make an empty one there
        raise UserError(
            f"{root}: MLflow's store of these runs, {store}, is not there; if the folder was moved, link its old place "
            f"to it: ln -s NEW {store.parent}"
        )
    _check_installed()
    address = UiAddress(host, port)
    address.check()
    command = [
        sys.executable, "-m", "mlflow", "server", "--backend-store-uri", state.uri, "--host", host,
        "--port", str(port), "--workers", "1",
    ]  # fmt: skip
    server = subprocess.Popen(
        command, env={**address.settings(), **os.environ, **_SETTINGS}, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        with signals_as_ctrl_c():
            _wait(server, address)
            say(f"charts of experiment '{state.experiment}': {charts_page(address.shown, state.experiment_id)}")
            if hint := address.hint(os.environ):
                say(hint)
            say("Ctrl-C ends the server")
            server.communicate()  # drains its output, which would fill the pipe
            raise UserError(f"the MLflow server ended by itself with code {server.returncode}")
    except KeyboardInterrupt:
        return 0
    finally:
        _end(server)


def newest(root: Path, experiment: str | None) -> CopyState:
    """The copy state of the newest run below `root`, a folder of runs or of one run.

    Raises UserError if there is none, or none in `experiment`.
    """
    files = [*root.glob("mlflow.json"), *root.glob("*/mlflow.json")]
    states = [read_state(file) for file in sorted(files, key=lambda file: file.stat().st_mtime, reverse=True)]
    known = [state for state in states if state.experiment_id]
    if not known:
        raise UserError(f"{root}: no run with a copy in MLflow; give the folder that holds the runs (run.output_dir)")
    wanted = [state for state in known if experiment in (None, state.experiment)]
    if not wanted:
        names = sorted({state.experiment for state in known})
        raise UserError(f"--experiment: no run of '{experiment}' below {root}{nearest(experiment or '', names)}")
    return wanted[0]


def _check_installed() -> None:
    try:
        version("mlflow")  # training needs mlflow-skinny, which has no pages
    except PackageNotFoundError as error:
        raise UserError("MLflow's pages are not installed; pip install '.[ui]'") from error


def _wait(server: subprocess.Popen[str], address: UiAddress) -> None:
    """Wait until it answers; raises UserError if it ends or takes too long."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if server.poll() is not None:
            _, said = server.communicate()
            last = (said.strip().splitlines() or ["it said nothing"])[-1]
            raise UserError(f"the MLflow server did not start: {without_password(last)}")
        try:
            with urlopen(f"{address.local}/health", timeout=5):
                return
        except (URLError, OSError):
            time.sleep(0.2)
    raise UserError(f"the MLflow server did not answer within {START_S:.0f} s")


def _end(server: subprocess.Popen[str]) -> None:
    """End the server with its workers."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, number)
            server.wait(timeout=10)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
