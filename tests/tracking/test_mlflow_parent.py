"""Runs that start at the same time share one parent run."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ilvr_ds.tracking.mlflow_parent import parent_run
from ilvr_ds.tracking.tracker import Tracker, TrackingTarget

START_S = 60.0
"""The first run in a store waits for MLflow's import and for its tables."""
MANY = 8


class Server:
    """Runs in memory; with `meet`, nobody is told what there is before everybody has asked."""

    def __init__(self, meet: int = 1) -> None:
        self.runs: dict[str, dict[str, str]] = {}
        self.deleted: list[str] = []
        self._meeting = threading.Barrier(meet)

    def search_runs(self, experiments: list[str], condition: str) -> list[Any]:
        value = condition.split("'")[1]
        found = [name for name, tags in self.runs.items() if value in tags.values() and name not in self.deleted]
        self._meeting.wait()
        return [self._run(name) for name in found]

    def create_run(self, experiment: str, run_name: str, tags: dict[str, str]) -> Any:
        name = f"run-{len(self.runs)}-{threading.get_ident()}"
        self.runs[name] = tags
        return self._run(name)

    def set_terminated(self, name: str) -> None:
        assert name in self.runs

    def delete_run(self, name: str) -> None:
        self.deleted.append(name)

    @staticmethod
    def _run(name: str) -> Any:
        return SimpleNamespace(info=SimpleNamespace(run_id=name))


def exists(client: Any, run: str) -> bool:
    return run in client.runs and run not in client.deleted


def ask(server: Server, folder: Path, name: str = "sweep-1") -> str:
    return parent_run(server, "1", name, folder, "http://server", exists)


def test_many_at_once_agree_on_one(tmp_path: Path) -> None:
    """The worst case: all look before anybody has created one."""
    server = Server(meet=MANY)
    with ThreadPoolExecutor(MANY) as pool:
        answers = list(pool.map(lambda _: ask(server, tmp_path), range(MANY)))
    assert len(set(answers)) == 1 and exists(server, answers[0])
    assert len(server.runs) - len(server.deleted) == 1
    assert len(list(tmp_path.iterdir())) == 1, "only the decision is left"


def test_a_later_job_finds_it_and_another_name_is_another_run(tmp_path: Path) -> None:
    server = Server()
    first = ask(server, tmp_path)
    assert ask(server, tmp_path) == first
    assert ask(server, tmp_path, name="sweep-2") != first


def test_one_that_nobody_could_tell_of_is_taken(tmp_path: Path) -> None:
    """Its maker was killed before the decision was written."""
    server = Server()
    first = ask(server, tmp_path)
    next(tmp_path.iterdir()).unlink()
    assert ask(server, tmp_path) == first and not server.deleted


def test_a_deleted_one_is_replaced(tmp_path: Path) -> None:
    server = Server()
    first = ask(server, tmp_path)
    server.delete_run(first)
    second = ask(server, tmp_path)
    assert second != first and ask(server, tmp_path) == second


def test_runs_go_below_their_parent_and_stay_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a real store; the second run goes on later, when its tags are sent again."""
    from mlflow import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def log(run: str, step: int) -> None:
        target = TrackingTarget(None, "exp", run, tmp_path, "sweep-1")
        tracker = Tracker(tmp_path / run, target, params={}, tags={"mlflow.parentRunId": "the run it starts from"})
        tracker.log(step, {"loss/ce": 1.0})
        assert tracker.close("FINISHED", START_S) == 0

    for run, step in (("one", 1), ("two", 1), ("two", 2)):
        log(run, step)
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("exp").experiment_id
    runs = {run.info.run_name: run for run in client.search_runs([experiment])}
    assert sorted(runs) == ["one", "sweep-1", "two"]
    parent = runs.pop("sweep-1").info
    assert parent.status == "FINISHED"
    assert {run.data.tags["mlflow.parentRunId"] for run in runs.values()} == {parent.run_id}
