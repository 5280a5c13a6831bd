"""Trackers of runs in one store, and what became of them there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ilvr_ds.tracking.record import read_record
from ilvr_ds.tracking.tracker import Tracker, TrackingTarget
from tests.stores import with_tables

START_S = 60.0
"""The first run in a store waits for MLflow's import and for its tables."""


def start(folder: Path, uri: str | None = None, **more: Any) -> Tracker:
    root = with_tables(folder.parent) if uri is None else folder  # the root's lock is held while a server is waited for
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


def draw(folder: Path, name: str) -> None:
    from PIL import Image

    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 10), "red").save(folder / "pictures" / name)


def stored_pictures(folder: Path) -> list[str]:
    [run] = runs_of(folder)
    files = client(folder.parent).list_artifacts(run.info.run_id, "images")
    return sorted(file.path.split("+timestamp")[0] for file in files if file.path.endswith(".png"))
