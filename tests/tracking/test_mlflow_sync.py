"""A real MLflow server that is absent, killed, answers 500, hangs or loses answers: nothing is late, lost or double."""

from __future__ import annotations

import json
import os
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ilvr_ds import cli
from ilvr_ds.errors import UserError
from ilvr_ds.tracking import mlflow_state, mlflow_sync, tracker
from ilvr_ds.tracking.mlflow_sync import sync
from ilvr_ds.tracking.record import Record
from ilvr_ds.tracking.tracker import Tracker, TrackingTarget
from tests.ranks import ROOT, free_port
from tests.tracking.proxy import Door, door_to

NO_JOBS = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
"""A server without the fifteen processes that run what we never ask for."""

STEPS, NAMES = 120, 20


class Server:
    """`mlflow server` as a process that can be killed and started again at the same port."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def store(self) -> str:
        return f"sqlite:///{self.folder / 'server.db'}"

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", self.store]
        command += [
            "--default-artifact-root",
            str(self.folder / "artifacts"),
            "--port",
            str(self.port),
            "--workers",
            "1",
        ]
        with (self.folder / "server.log").open("a") as log:
            self.process = subprocess.Popen(
                command, env={**os.environ, **NO_JOBS}, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + 120
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            assert time.monotonic() < deadline, (self.folder / "server.log").read_text()[-2000:]
            time.sleep(0.1)

    def kill(self) -> None:
        if self.process:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.process = None


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    pytest.importorskip("flask", reason="the server is part of the extra [ui]")
    server = Server(tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def door(server: Server) -> Iterator[Door]:
    with door_to(server.port) as door:
        yield door


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")  # a busy machine needs seconds
    monkeypatch.setattr(tracker, "FIRST_RETRY_S", 0.1)
    monkeypatch.setattr(tracker, "LAST_RETRY_S", 0.4)
    monkeypatch.setattr(mlflow_sync, "PAUSES_S", (0.1, 1.0, 2.0))


def start(folder: Path, uri: str) -> Tracker:
    return Tracker(folder, TrackingTarget(uri, "exp", folder.name, folder.parent), params={"a": 1}, tags={"t": "x"})


def points(server: Server, folder: Path) -> list[tuple[str, int, float, int]]:
    """Every row of the store that belongs to runs of this name: one a point if nothing is double."""
    with sqlite3.connect(server.folder / "server.db") as store:
        query = (
            "select m.key, m.step, m.value, m.timestamp from metrics m join runs r using (run_uuid) where r.name = ?"
        )
        return sorted(store.execute(query, (folder.name,)).fetchall())


def recorded(folder: Path) -> list[tuple[str, int, float, int]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return sorted(
        (name, line["step"], value, int(line["time"] * 1000))
        for line in lines
        for name, value in line.get("metrics", {}).items()
    )


def train(tracker: Tracker, steps: int, at: dict[int, Callable[[], Any]] | None = None) -> list[float]:
    """Logs `steps` steps, does what is due at some of them; seconds of each call of log."""
    seconds = []
    for step in range(1, steps + 1):
        (at or {}).get(step, lambda: None)()
        began = time.perf_counter()
        tracker.log(step, {f"m/{n}": step + n / 7 for n in range(NAMES)})
        seconds.append(time.perf_counter() - began)
        time.sleep(0.01)
    return seconds


@pytest.mark.parametrize("trouble", ["500", *(pytest.param(t, marks=pytest.mark.drill) for t in ("hang", "mute"))])
def test_whatever_the_server_does_training_does_not_wait_and_all_arrives_once(
    trouble: str, server: Server, door: Door, tmp_path: Path
) -> None:
    """The middle of the run is in trouble. Catches a call that waits, a lost point, a second run and a double point."""
    folder = tmp_path / f"run-{trouble}"
    tracker = start(folder, door.uri)
    changes = {40: lambda: setattr(door, "mode", trouble), 110: lambda: setattr(door, "mode", "open")}
    if trouble == "mute":
        changes[1] = changes[40]  # the answer to the making of the run is lost too
    seconds = train(tracker, STEPS, changes)
    # a line of JSON to a buffered file takes tens of microseconds; the other thread may hold the interpreter for
    # its switch interval of 5 ms, and the machine is shared, hence the median
    assert statistics.median(seconds) < 1e-3
    tracker.close("FINISHED", 60)
    sync(folder)
    assert len(recorded(folder)) == STEPS * NAMES
    assert points(server, folder) == recorded(folder)


def test_absent_at_start_then_sent_by_the_command(
    server: Server, door: Door, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody listens during the whole run; the command says so with code 2, then sends, then has nothing to do."""
    monkeypatch.setattr(cli, "_set_up_logging", lambda rank: None)
    folder = tmp_path / "run-absent"
    nobody = f"http://127.0.0.1:{free_port()}"
    tracker = start(folder, nobody)
    assert statistics.median(train(tracker, STEPS)) < 1e-3
    assert tracker.close("FINISHED", 0.5) == STEPS
    assert cli.main(["mlflow-sync", str(folder)]) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert nobody in line and f"{STEPS} lines of" in line
    for sent in (STEPS * NAMES, 0):
        assert cli.main(["mlflow-sync", str(folder), "--uri", door.uri]) == 0
        [line] = capsys.readouterr().out.splitlines()
        assert f"metrics.jsonl: {sent} points sent to {door.uri}" in line
    assert points(server, folder) == recorded(folder)


def test_a_server_killed_and_started_again(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """kill -9 of a real server in the middle of a run, and again while it is synced."""
    folder = tmp_path / "run-killed"
    tracker = start(folder, f"http://127.0.0.1:{server.port}")
    assert statistics.median(train(tracker, STEPS, {60: server.kill})) < 1e-3
    tracker.close("FINISHED", 0.5)
    with pytest.raises(UserError, match="are not sent"):
        sync(folder)
    server.start()
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")  # its first answers take long on a busy machine
    sync(folder)
    assert points(server, folder) == recorded(folder)


def test_two_syncs_at_once_send_nothing_twice(server: Server, door: Door, tmp_path: Path) -> None:
    folder = tmp_path / "run-twice"
    tracker = start(folder, f"http://127.0.0.1:{free_port()}")
    train(tracker, STEPS)
    tracker.close("FINISHED", 0.1)
    command = [sys.executable, "-m", "ilvr_ds.cli", "mlflow-sync", str(folder), "--uri", door.uri]
    children = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [child.communicate(timeout=120)[0] for child in children]
    assert [child.returncode for child in children] == [0, 0]
    assert sorted(int(output.split(": ")[1].split()[0]) for output in outputs) == [0, STEPS * NAMES]
    assert points(server, folder) == recorded(folder)


def test_killed_between_sending_and_noting(server: Server, door: Door, tmp_path: Path) -> None:
    """A process that dies there sends its last points again: the store must know them. Catches times made anew."""
    folder = tmp_path / "run-noted"
    tracker = start(folder, door.uri)
    train(tracker, 30)
    tracker.close("FINISHED", 60)
    state = mlflow_state.read_state(folder / "mlflow.json")
    state.offset, state.last_steps = 0, {}
    mlflow_state.write_state(folder / "mlflow.json", state)
    assert "600 points sent" in sync(folder)[0]
    assert points(server, folder) == recorded(folder)


def test_a_run_that_was_killed_and_tries_before_it_are_sent(server: Server, door: Door, tmp_path: Path) -> None:
    """No end in the record: the run keeps its mark. An earlier try set aside is a run of its own."""
    folder = tmp_path / "run-tries"
    for goes_on in (True, False):
        target = TrackingTarget(f"http://127.0.0.1:{free_port()}", "exp", folder.name, tmp_path)
        tracker = Tracker(folder, target, params={}, tags={}, goes_on=goes_on)
        train(tracker, 3)
    record = Record(folder / "metrics.jsonl")
    record.close()
    lines = sync(folder, door.uri)
    assert [line.partition(":")[0] for line in lines] == ["metrics.1.jsonl", "metrics.jsonl"]
    assert len(points(server, folder)) == 2 * 3 * NAMES
