"""The copy, against servers that hang, lose or refuse."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ilvr_ds.tracking.mlflow_copy import MlflowCopy
from ilvr_ds.tracking.tracker import TrackingTarget
from tests.tracking.trackers import START_S, client, draw, history, log, recorded, runs_of, start, stored_pictures


def test_more_than_one_request_of_metrics_arrives(folder: Path) -> None:
    tracker = start(folder)
    for step in (1, 2):
        tracker.log(step, {f"m/{n}": float(n) for n in range(1201)})
    assert tracker.close("FINISHED", START_S) == 0
    [run] = runs_of(folder)
    assert len([name for name in run.data.metrics if name.startswith("m/")]) == 1201
    assert history(folder, "m/1200") == [(1, 1200.0), (2, 1200.0)]


def test_numbers_that_are_none_do_not_stop_the_copy(folder: Path) -> None:
    tracker = start(folder)
    for step, value in enumerate([1.0, float("nan"), float("inf"), 2.0]):
        tracker.log(step, {"loss/ce": value})
    assert tracker.close("FINISHED", START_S) == 0
    assert [step for step, _ in history(folder, "loss/ce")] == [0, 1, 2, 3]


@pytest.fixture(params=["refuses", "hangs", "answers nonsense"])
def bad_server(request: pytest.FixtureRequest) -> Iterator[str]:
    """Address of a useless server."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        held = []

        def serve() -> None:
            while True:
                try:
                    held.append(server.accept()[0])
                except OSError:
                    return
                if request.param == "answers nonsense":
                    held[-1].sendall(b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 2\r\n\r\nno")
                    held[-1].close()

        if request.param != "refuses":
            server.listen()
            threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        for connection in held:
            connection.close()


def test_a_bad_server_delays_nothing_and_what_was_not_sent_is_sent_later(
    folder: Path, bad_server: str, caplog: pytest.LogCaptureFixture
) -> None:
    before = set(threading.enumerate())
    began = time.monotonic()
    tracker = start(folder, bad_server)
    log(tracker, range(1, 101))
    assert time.monotonic() - began < 2, "also while MLflow is being imported"
    began = time.monotonic()
    assert tracker.close("KILLED", timeout_s=2) == 100
    assert time.monotonic() - began < 4
    assert [line["step"] for line in recorded(folder) if "metrics" in line] == list(range(1, 101))
    assert "100 lines of" in caplog.text and bad_server in caplog.text
    for given_up in {thread for thread in threading.enumerate() if thread.name == "mlflow"} - before:
        given_up.join(30)
        assert not given_up.is_alive(), "it ends with the request it is at, and does not go on knocking"

    later = start(folder)
    log(later, range(101, 103))
    assert later.close("FINISHED", START_S) == 0
    assert history(folder, "loss/ce") == [(n, n + 0.5) for n in range(1, 103)]


def test_a_server_that_hangs_does_not_keep_the_process_alive(folder: Path) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        uri = f"http://127.0.0.1:{server.getsockname()[1]}"
        began = time.monotonic()
        child = subprocess.run([sys.executable, "-c", SCRIPT, str(folder), uri, "1"], timeout=60, check=False)
    assert child.returncode == 0
    assert time.monotonic() - began < 30


def test_two_processes_may_make_the_store_at_once(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    with (tmp_path / "errors").open("a") as errors:
        children = [
            subprocess.Popen(
                [sys.executable, "-c", TOGETHER + SCRIPT, str(folder), "", "60"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
            )
            for folder in folders
        ]  # fmt: skip
    assert [child.stdout.readline() for child in children if child.stdout] == ["ready\n"] * 2
    for child in children:
        assert child.stdin is not None
        child.stdin.close()
    assert [child.wait(timeout=120) for child in children] == [0, 0]
    assert "retried" not in (tmp_path / "errors").read_text(), "neither came in the other's way"
    for folder in folders:
        assert history(folder, "loss/ce") == [(1, 1.0)]


TOGETHER = """
import sys
import mlflow.store.tracking.sqlalchemy_store
print("ready", flush=True)
sys.stdin.readline()
"""


SCRIPT = """
import sys
from pathlib import Path
from ilvr_ds.tracking.tracker import Tracker, TrackingTarget
folder, uri, seconds = Path(sys.argv[1]), sys.argv[2] or None, float(sys.argv[3])
tracker = Tracker(folder, TrackingTarget(uri, "exp", folder.name, folder.parent), params={}, tags={})
tracker.log(1, {"loss/ce": 1.0})
tracker.close("FINISHED", seconds)
"""


def test_parameters_arrive_though_the_first_try_fails(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run that counts as described as soon as it exists."""
    from mlflow import MlflowClient

    log_batch, failures = MlflowClient.log_batch, []

    def failing(self: Any, run_id: str, *args: Any, **more: Any) -> Any:
        if not failures:
            failures.append(run_id)
            raise OSError("the server went away")
        return log_batch(self, run_id, *args, **more)

    monkeypatch.setattr(MlflowClient, "log_batch", failing)
    tracker = start(folder, params={"optim.lr": 1e-5})
    log(tracker, range(1, 3))
    assert tracker.close("FINISHED", START_S) == 0
    [run] = runs_of(folder)
    assert failures == [run.info.run_id]
    assert run.data.params == {"optim.lr": "1e-05"}


def test_a_run_that_the_store_lost_is_sent_again_whole(folder: Path) -> None:
    tracker = start(folder)
    log(tracker, range(1, 4))
    assert tracker.close("FINISHED", START_S) == 0
    [run] = runs_of(folder)
    client(folder.parent).delete_run(run.info.run_id)
    tracker = start(folder)
    log(tracker, range(4, 6))
    assert tracker.close("FINISHED", START_S) == 0
    assert [step for step, _ in history(folder, "loss/ce")] == [1, 2, 3, 4, 5]


def test_a_metric_that_mlflow_refuses_does_not_hold_up_the_others(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = start(folder)
    with caplog.at_level("WARNING", logger="ilvr_ds"):
        tracker.log(1, {"loss/ce": 2.0, "bad (name)": 1.0, "lr": 0.5})
        assert tracker.close("FINISHED", START_S) == 0
    assert history(folder, "loss/ce") == [(1, 2.0)] and history(folder, "lr") == [(1, 0.5)]
    assert "MLflow refuses bad (name); recorded in" in caplog.text


def test_settings_that_mlflow_refuses_do_not_hold_up_the_metrics(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a run whose copy stops for good, as the server never changes a parameter."""
    tracker = start(folder)
    assert tracker.close("FINISHED", START_S) == 0
    state = json.loads((folder / "mlflow.json").read_text())
    state |= {"params": {"optim.lr": "2", "optim.eps": "3"}, "described": False}
    (folder / "mlflow.json").write_text(json.dumps(state))
    target = TrackingTarget(None, "exp", folder.name, folder.parent)
    with caplog.at_level("WARNING", logger="ilvr_ds"):
        MlflowCopy(folder / "metrics.jsonl", folder / "mlflow.json", target).send()
    assert "MLflow keeps optim.lr of run" in caplog.text
    [run] = runs_of(folder)
    assert run.data.params == {"optim.lr": "1e-05", "optim.eps": "3"}


def test_settings_that_changed_when_the_run_went_on_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches a run that shows the settings, or the machines, of its first start in silence, as parameters and as
    files."""
    data = {"name": "d", "digest": "0", "source": "/d", "context": "training", "profile": {}}
    (folder := tmp_path / "run").mkdir()
    told = []
    files = [folder / "recipe.json", folder / "environment.json"]
    for host, params in enumerate(
        ({"optim.lr": 1, "optim.eta": 2}, *[{"optim.lr": 5, "optim.eta": 2, "optim.eps": 3}] * 2)
    ):
        for file, content in zip(files, (params, {"host": host}), strict=True):
            file.write_text(json.dumps(content))
        caplog.clear()
        with caplog.at_level("WARNING", logger="ilvr_ds"):
            tracker = start(folder, params=params, artifacts=files, datasets=[data])
            assert tracker.close("FINISHED", START_S) == 0
        told.append("MLflow keeps optim.lr of run" in caplog.text)
        for file in files:
            [stored] = (folder.parent / "mlartifacts").rglob(file.name)
            assert stored.read_text() == file.read_text()
    assert told == [False, True, False], "once, when it changed"
    [run] = runs_of(folder)
    assert run.data.params == {"optim.lr": "1", "optim.eta": "2", "optim.eps": "3"}
    assert len(run.inputs.dataset_inputs) == 1


def test_pictures_arrive_once_with_their_step(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches pictures that are sent again after a restart, or after an answer that got lost."""
    from mlflow import MlflowClient

    log_image, calls = MlflowClient.log_image, []

    def losing_the_answer(self: Any, *args: Any, **more: Any) -> None:
        log_image(self, *args, **more)
        calls.append(more["step"])
        if len(calls) == 1:
            raise OSError("the answer got lost")

    monkeypatch.setattr(MlflowClient, "log_image", losing_the_answer)
    tracker = start(folder)
    for step in (0, 5):
        draw(folder, f"a-{step}.png")
        tracker.picture(step, "selection/sample 1", f"a-{step}.png", 0.1)
    tracker.picture(5, "selection/sample 2", "gone.png", 0.1)
    assert tracker.close("KILLED", START_S) == 0
    again = start(folder)
    again.picture(5, "selection/sample 1", "a-5.png", 0.1)  # trained again
    draw(folder, "a-9.png")
    again.picture(9, "selection/sample 1", "a-9.png", 0.1)
    assert again.close("FINISHED", START_S) == 0
    assert stored_pictures(folder) == [f"images/selection~sample 1+step+{step}" for step in (0, 5, 9)]
    assert calls == [0, 5, 9]
