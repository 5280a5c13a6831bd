from __future__ import annotations

import json
import shlex
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
from ilvr_ds.tracking.record import read_record
from ilvr_ds.tracking.tracker import Tracker, TrackingTarget

START_S = 60.0
"""The first run in a store waits for MLflow's import and for its tables."""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One root for all tests: making the tables of a store takes seconds."""
    return tmp_path_factory.mktemp("outputs")


@pytest.fixture(autouse=True)
def no_other_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def folder(store: Path, request: pytest.FixtureRequest) -> Path:
    name: str = request.node.name
    return store / name.replace("[", "-").strip("]")


def start(folder: Path, uri: str | None = None, **more: Any) -> Tracker:
    root = folder.parent if uri is None else folder  # the root's lock is held while a server is waited for
    target = TrackingTarget(uri, "exp", folder.name, root)
    settings: dict[str, Any] = {"params": {"optim.lr": 1e-5}, "tags": {"stage": "1"}, **more}
    return Tracker(folder, target, **settings)


def client(store: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{store / 'mlflow.db'}")


def runs_of(folder: Path) -> list[Any]:
    """The MLflow runs with this run's name."""
    found = client(folder.parent)
    experiment = found.get_experiment_by_name("exp")
    return [run for run in found.search_runs([experiment.experiment_id]) if run.info.run_name == folder.name]


def history(folder: Path, name: str) -> list[tuple[int, float]]:
    [run] = runs_of(folder)
    return sorted((m.step, m.value) for m in client(folder.parent).get_metric_history(run.info.run_id, name))


def recorded(folder: Path) -> list[dict[str, Any]]:
    return [line for line, _ in read_record(folder / "metrics.jsonl")]


def log(tracker: Tracker, steps: range, value: float = 0.5) -> None:
    for step in steps:
        tracker.log(step, {"loss/ce": step + value})


def test_all_of_a_run_arrives(folder: Path, tmp_path: Path) -> None:
    params = {f"section.key_{n}": n for n in range(130)} | {"data.eval_shards": None}
    (tmp_path / "recipe.json").write_text("{}")
    tracker = start(folder, params=params, tags={"host": "h"}, artifacts=[tmp_path / "recipe.json"])
    log(tracker, range(1, 4))
    for step in (2, 3):
        tracker.event("checkpoint", step=step, path=f"/runs/checkpoints/step-{step}")
    assert tracker.close("FINISHED", START_S) == 0
    [run] = runs_of(folder)
    assert run.data.tags["checkpoint"] == "/runs/checkpoints/step-3"
    assert run.info.run_id == tracker.run_id and run.info.status == "FINISHED"
    assert run.data.params == {name: str(value) for name, value in params.items()}
    assert run.data.tags["host"] == "h"
    assert history(folder, "loss/ce") == [(1, 1.5), (2, 2.5), (3, 3.5)]
    assert [path.name for path in (folder.parent / "mlartifacts").rglob("*.json")] == ["recipe.json"]


def test_a_logged_step_costs_the_training_thread_next_to_nothing(tmp_path: Path) -> None:
    """Catches a call that talks to the server, or writes what it need not: 1 % of a step of 0.2 s is 2 ms."""
    tracker = start(tmp_path / "run", uri="http://127.0.0.1:9")
    metrics = {f"m/{n}": n / 7 for n in range(60)}
    before = time.thread_time()
    for step in range(200):
        tracker.log(step, metrics)
    assert (time.thread_time() - before) / 200 < 0.002
    tracker.close("KILLED", timeout_s=0)


def test_times_are_those_of_the_record(folder: Path) -> None:
    tracker = start(folder)
    log(tracker, range(1, 2))
    tracker.close("FINISHED", START_S)
    [run] = runs_of(folder)
    [point] = client(folder.parent).get_metric_history(run.info.run_id, "loss/ce")
    assert point.timestamp == int(recorded(folder)[0]["time"] * 1000)


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


def test_a_run_that_goes_on_is_the_same_run_without_double_points(folder: Path) -> None:
    first = start(folder)
    log(first, range(1, 6))
    first.close("KILLED", START_S)
    second = start(folder)
    log(second, range(4, 9), value=0.75)  # steps 4 and 5 are trained again from an older checkpoint
    assert second.close("FINISHED", START_S) == 0
    [run] = runs_of(folder)
    assert run.info.run_id == first.run_id == second.run_id and run.info.status == "FINISHED"
    assert history(folder, "loss/ce") == [(n, n + (0.5 if n < 6 else 0.75)) for n in range(1, 9)]
    assert len([line for line in recorded(folder) if "metrics" in line]) == 10, "the record holds everything"


def test_the_state_says_how_far_the_copy_is(folder: Path) -> None:
    tracker = start(folder)
    log(tracker, range(1, 4))
    tracker.close("FINISHED", START_S)
    state = json.loads((folder / "mlflow.json").read_text())
    assert state["run_id"] == tracker.run_id
    assert state["offset"] == (folder / "metrics.jsonl").stat().st_size


def test_a_run_from_the_start_leaves_the_earlier_try_alone(folder: Path) -> None:
    first = start(folder)
    log(first, range(1, 3))
    first.close("FAILED", START_S)
    second = start(folder, goes_on=False)
    log(second, range(1, 2), value=0.25)
    assert second.close("FINISHED", START_S) == 0
    assert len(runs_of(folder)) == 2 and first.run_id != second.run_id
    assert [line["step"] for line in recorded(folder) if "metrics" in line] == [1]
    assert [line["step"] for line, _ in read_record(folder / "metrics.1.jsonl") if "metrics" in line] == [1, 2]


def test_other_ranks_write_nothing(folder: Path) -> None:
    tracker = start(folder, is_writer=False)
    log(tracker, range(1, 3))
    tracker.event("checkpoint", path="c")
    assert (tracker.run_id, tracker.close("FINISHED")) == (None, 0)
    assert not folder.exists()


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


def test_a_run_from_the_start_keeps_an_earlier_record_apart(folder: Path) -> None:
    """Catches points of two runs in one curve, and new points that are dropped because old steps were sent."""
    for value in (0.5, 0.25):
        tracker = start(folder, goes_on=False)
        log(tracker, range(1, 3), value)
        assert tracker.close("FINISHED", START_S) == 0
    assert len(runs_of(folder)) == 2
    assert [line["metrics"]["loss/ce"] for line in recorded(folder) if "metrics" in line] == [1.25, 2.25]
    assert (folder / "metrics.1.jsonl").exists()


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


def test_the_command_to_look_at_a_run_can_be_pasted(tmp_path: Path) -> None:
    """Catches a folder with a space, of which a shell makes two."""
    folder = tmp_path / "my runs" / "a"
    folder.mkdir(parents=True)
    tracker = start(folder, f"sqlite:///{tmp_path}/mlflow.db")
    assert shlex.split(tracker.how_to_look()) == ["ilvr-ds", "ui", str(folder)]
    tracker.close("KILLED", 0)


def test_the_run_above_is_known_at_the_first_start_alone(folder: Path) -> None:
    """Catches a second stage that goes on, and is no child of the first any more."""
    tracker = start(folder, "http://127.0.0.1:9", tags={"mlflow.parentRunId": "abc", "host": "a"})
    tracker.close("KILLED", 0)
    tracker = start(folder, "http://127.0.0.1:9", tags={"host": "b"}, goes_on=True)
    tracker.close("KILLED", 0)
    tags = json.loads((folder / "mlflow.json").read_text())["tags"]
    assert tags == {"mlflow.parentRunId": "abc", "host": "b"}


def draw(folder: Path, name: str) -> None:
    from PIL import Image

    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 10), "red").save(folder / "pictures" / name)


def stored_pictures(folder: Path) -> list[str]:
    [run] = runs_of(folder)
    files = client(folder.parent).list_artifacts(run.info.run_id, "images")
    return sorted(file.path.split("+timestamp")[0] for file in files if file.path.endswith(".png"))


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


def test_going_back_is_a_run_of_its_own_that_begins_with_the_common_steps(folder: Path) -> None:
    """Catches curves that show the way that was left, for MLflow drops new points of old steps and deletes none."""
    first = start(folder, tags={"mlflow.parentRunId": "abc", "host": "a"})
    for step in (2, 5):
        draw(folder, f"a-{step}.png")
        first.picture(step, "curves", f"a-{step}.png", 0.1)
    log(first, range(1, 6))
    assert first.close("KILLED", START_S) == 0
    found = client(folder.parent)
    found.update_run(first.run_id, status="RUNNING")  # as kill -9 leaves it

    for value in (0.75, 0.25):  # the second start is a requeue before anything was saved: the same way
        second = start(folder, **({"back_to": 2} if value == 0.75 else {}), run_id=first.run_id)
        log(second, range(3, 5), value)
        assert second.close("FINISHED", START_S) == 0
    assert [step for step, _ in history(folder, "loss/ce")] == [1, 2, 3, 4]
    assert history(folder, "loss/ce") == [(1, 1.5), (2, 2.5), (3, 3.75), (4, 4.75)]
    assert stored_pictures(folder) == ["images/curves+step+2"]
    assert [p.name for p in (folder / "pictures").iterdir()] == ["a-2.png"]
    tags = found.get_run(second.run_id).data.tags
    assert (tags["ilvr_ds.went_back_from"], tags["mlflow.parentRunId"]) == (first.run_id, "abc")
    left = found.get_run(first.run_id)
    assert left.info.run_name == f"{folder.name} (left after step 2)" and left.info.status == "KILLED"
    assert left.data.tags["ilvr_ds.left_for"] == second.run_id
    assert [m.step for m in found.get_metric_history(first.run_id, "loss/ce")] == [1, 2, 3, 4, 5]
    assert [line["step"] for line, _ in read_record(folder / "metrics.1.jsonl") if "metrics" in line] == [1, 2, 3, 4, 5]


def test_going_back_to_where_the_record_ends_leaves_nothing(folder: Path) -> None:
    first = start(folder)
    log(first, range(1, 3))
    assert first.close("KILLED", START_S) == 0
    second = start(folder, back_to=2)
    log(second, range(3, 5))
    assert second.close("FINISHED", START_S) == 0
    assert second.run_id == first.run_id and not (folder / "metrics.1.jsonl").exists()


def test_going_back_behind_what_no_server_has_seen(folder: Path) -> None:
    first = start(folder, "http://127.0.0.1:9")
    log(first, range(1, 6))
    first.close("KILLED", 0)
    second = start(folder, back_to=2)
    log(second, range(3, 5), 0.75)
    assert second.close("FINISHED", START_S) == 0
    assert history(folder, "loss/ce") == [(1, 1.5), (2, 2.5), (3, 3.75), (4, 4.75)]


def test_data_sets_and_the_tags_of_the_last_start_arrive(folder: Path) -> None:
    """Catches tags that stay those of the first start: the number of ranks may change."""
    data = {"name": "train", "digest": "abc", "source": "/data", "context": "training", "profile": {"samples": 7}}
    for world in ("1", "2"):
        tracker = start(folder, tags={"world_size": world, "uri": "http://me:secret@host/"}, datasets=[data])
        assert tracker.close("KILLED", START_S) == 0
    [run] = runs_of(folder)
    assert (run.data.tags["world_size"], run.data.tags["attempt"]) == ("2", "2")
    assert run.data.tags["uri"] == "http://host/", "no password reaches the store"
    [found] = run.inputs.dataset_inputs
    assert (found.dataset.name, found.dataset.digest, found.tags[0].value) == ("train", "abc", "training")
    assert json.loads(found.dataset.profile) == {"samples": 7}
