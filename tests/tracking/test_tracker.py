"""What a run records, and that it arrives in MLflow."""

from __future__ import annotations

import json
import shlex
import shutil
import time
from pathlib import Path

import pytest

from ilvr_ds.tracking.tracker import Tracker, TrackingTarget
from tests.tracking.trackers import START_S, client, history, log, recorded, runs_of, start


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


def test_evaluations_are_those_of_the_record_each_once(tmp_path: Path) -> None:
    tracker = start(tmp_path / "run", uri="http://127.0.0.1:9")
    for step, value in ((4, 2.0), (2, float("nan")), (4, 1.0)):
        tracker.log(step, {"loss/ce": 9.0})
        tracker.log(step, {"eval/ce": value, "eval/skipped": 0.0})
    assert repr(tracker.evaluations()) == repr(
        [(2, {"eval/ce": float("nan"), "eval/skipped": 0.0}), (4, {"eval/ce": 1.0, "eval/skipped": 0.0})]
    )
    tracker.close("KILLED", timeout_s=0)


def test_times_are_those_of_the_record(folder: Path) -> None:
    tracker = start(folder)
    log(tracker, range(1, 2))
    tracker.close("FINISHED", START_S)
    [run] = runs_of(folder)
    [point] = client(folder.parent).get_metric_history(run.info.run_id, "loss/ce")
    assert point.timestamp == int(recorded(folder)[0]["time"] * 1000)


def test_the_state_says_how_far_the_copy_is(folder: Path) -> None:
    tracker = start(folder)
    log(tracker, range(1, 4))
    tracker.close("FINISHED", START_S)
    state = json.loads((folder / "mlflow.json").read_text())
    assert state["run_id"] == tracker.run_id
    assert state["offset"] == (folder / "metrics.jsonl").stat().st_size


def test_other_ranks_write_nothing(folder: Path) -> None:
    tracker = start(folder, is_writer=False)
    log(tracker, range(1, 3))
    tracker.event("checkpoint", path="c")
    assert (tracker.run_id, tracker.close("FINISHED")) == (None, 0)
    assert not folder.exists()


def test_the_command_to_look_at_a_run_can_be_pasted(tmp_path: Path) -> None:
    """Catches a folder with a space, of which a shell makes two."""
    folder = tmp_path / "my runs" / "a"
    folder.mkdir(parents=True)
    tracker = start(folder, f"sqlite:///{tmp_path}/mlflow.db")
    assert shlex.split(tracker.how_to_look()) == ["ilvr-ds", "ui", str(folder)]
    tracker.close("KILLED", 0)


@pytest.mark.parametrize(("is_copied", "experiment"), [(True, "exp"), (False, "another")])
def test_a_copied_run_and_one_in_another_experiment_are_runs_of_their_own(
    folder: Path, caplog: pytest.LogCaptureFixture, is_copied: bool, experiment: str
) -> None:
    """Catches two runs that write their curves into one, and charts without the run."""
    first = start(folder)
    log(first, range(1, 2))
    assert first.close("FINISHED", START_S) == 0
    copied = shutil.copytree(folder, folder.with_name("copy")) if is_copied else folder
    name = copied.name
    with caplog.at_level("WARNING", logger="ilvr_ds"):
        second = Tracker(copied, TrackingTarget(None, experiment, name, folder.parent), params={}, tags={})
        log(second, range(2, 3))
        assert second.close("FINISHED", START_S) == 0
    assert f"goes on as '{name}' in '{experiment}': it is sent to MLflow as a new run" in caplog.text
    server = client(folder.parent)
    steps = [[m.step for m in server.get_metric_history(run, "loss/ce")] for run in (first.run_id, second.run_id)]
    assert steps == [[1], [1, 2]]
    assert server.get_run(second.run_id).info.experiment_id == server.get_experiment_by_name(experiment).experiment_id


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
