from __future__ import annotations

import os
import signal
import socket
import subprocess
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import cast

import pytest

from ilvr_ds.errors import UserError
from ilvr_ds.tracking import ui
from ilvr_ds.tracking.mlflow_state import CopyState, write_state
from ilvr_ds.tracking.names import sqlite_uri
from tests.ranks import free_port


def write(folder: Path, experiment: str, number: str, uri: str = "") -> None:
    """A run; its store is a file beside it, or at `uri`."""
    folder.mkdir(parents=True)
    if not uri:
        (folder.parent / "mlflow.db").touch()
        uri = sqlite_uri(folder.parent / "mlflow.db")
    write_state(folder / "mlflow.json", CopyState(uri=uri, experiment=experiment, experiment_id=number, run_id="r"))


def test_charts_are_those_of_the_wanted_experiment(tmp_path: Path) -> None:
    write(tmp_path / "a", "first", "1")
    write(tmp_path / "b", "second", "2")
    assert ui.newest(tmp_path, "first").experiment_id == "1"
    assert ui.newest(tmp_path / "b", None).experiment_id == "2", "the folder of one run"
    with pytest.raises(UserError, match=r"no run of 'secnd' .* did you mean 'second'"):
        ui.newest(tmp_path, "secnd")
    with pytest.raises(UserError, match="no run with a copy in MLflow"):
        ui.newest(tmp_path / "nowhere", None)


def test_without_full_mlflow_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches mlflow-skinny, which has no pages, taken for the whole."""
    write(tmp_path / "a", "first", "1")

    def version(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(ui, "version", version)
    with pytest.raises(UserError, match=r"pip install '.\[ui\]'"):
        ui.show(tmp_path, None, 1, print)


def test_a_taken_port_is_an_error_before_anything_starts(tmp_path: Path) -> None:
    write(tmp_path / "a", "first", "1")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(UserError, match=r"--port: .* is taken"):
            ui.show(tmp_path, None, other.getsockname()[1], print)
    with pytest.raises(UserError, match="--port: 99999 is not a port"):
        ui.show(tmp_path, None, 99999, print)


def test_runs_that_were_moved_away_from_their_store_are_no_empty_page(tmp_path: Path) -> None:
    """Catches MLflow's pages of a store that MLflow has just made, at the old place."""
    write(tmp_path / "outputs" / "a", "first", "1")
    (tmp_path / "outputs").rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"moved: .*outputs/mlflow\.db, is not there; .* ln -s NEW .*/outputs$"):
        ui.show(tmp_path / "moved", None, free_port(), print)
    assert not (tmp_path / "outputs").exists()


def test_a_run_on_a_server_has_its_page_there(tmp_path: Path) -> None:
    """Catches a second server in front of one that runs."""
    write(tmp_path / "a", "first", "7", uri="http://store:5000")
    said: list[str] = []
    assert ui.show(tmp_path, None, 1, said.append) == 0
    assert "http://store:5000/#/experiments/7/runs?compareRunsMode=CHART" in said[0]


def test_a_server_on_a_network_waits_locally_and_warns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a host that does not reach the server, and a network that MLflow turns away."""
    write(tmp_path / "a", "first", "7")
    seen: dict[str, object] = {}

    def start(command: list[str], env: dict[str, str], **options: object) -> subprocess.Popen[str]:
        seen.update(command=command, env=env)
        return cast("subprocess.Popen[str]", FinishedServer())

    monkeypatch.setattr(ui.subprocess, "Popen", start)
    monkeypatch.setattr(ui, "_wait", lambda server, address: seen.update(asked=address.local))
    monkeypatch.setattr(ui, "_end", lambda server: None)
    said: list[str] = []
    port = free_port()
    assert ui.show(tmp_path, None, port, said.append, "0.0.0.0") == 0
    command, env = cast("list[str]", seen["command"]), cast("dict[str, str]", seen["env"])
    assert command[command.index("--host") + 1] == "0.0.0.0" and seen["asked"] == f"http://127.0.0.1:{port}"
    assert f"http://{socket.gethostname()}:{port}/#/experiments/7" in said[0]
    assert said[1].startswith("warning: MLflow has no login") and len(said) == 3
    assert f"{socket.gethostname()}:{port}" in env["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")


@pytest.mark.parametrize("ended_by", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_also_in_the_background_of_a_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ended_by: signal.Signals
) -> None:
    """Catches a `kill -INT` without effect: shells let the background processes of a script ignore it."""
    write(tmp_path / "a", "first", "7")

    class Server:
        returncode = 0

        def communicate(self) -> None:
            os.kill(os.getpid(), ended_by)

    monkeypatch.setattr(ui.subprocess, "Popen", lambda *_, **__: Server())
    monkeypatch.setattr(ui, "_wait", lambda server, address: None)
    monkeypatch.setattr(ui, "_end", lambda server: None)
    before = signal.signal(ended_by, signal.SIG_IGN)
    try:
        assert ui.show(tmp_path, None, free_port(), lambda line: None) == 0
        assert signal.getsignal(ended_by) is signal.SIG_IGN, "as it was"
    finally:
        signal.signal(ended_by, before)


class FinishedServer:
    """A server that Ctrl-C ends at once."""

    def communicate(self) -> None:
        raise KeyboardInterrupt
