"""Paths with letters that mean something in an address: the store lies where run.output_dir says."""

from __future__ import annotations

from pathlib import Path

import pytest

from ilvr_ds.tracking.mlflow_state import TrackingTarget, read_state
from ilvr_ds.tracking.mlflow_sync import sync
from ilvr_ds.tracking.names import sqlite_path, sqlite_uri, without_password
from ilvr_ds.tracking.scores import log_scores
from ilvr_ds.tracking.tracker import Tracker

HARD = "/runs/a?b=c#d/100%/x%20y/u@h/p:q@r/\u8a08 z"


def test_a_path_survives_its_address() -> None:
    for path in (HARD, "/a@b/runs", "/plain/runs"):
        file = Path(path, "mlflow.db")
        assert sqlite_path(sqlite_uri(file)) == file
    assert sqlite_uri(Path("/plain/a b/mlflow.db")) == "sqlite:////plain/a b/mlflow.db"
    assert sqlite_path("http://host/x") is None
    assert sqlite_path("sqlite:///runs/mlflow.db?timeout=3") == Path("runs/mlflow.db").absolute()


def test_a_relative_path_is_that_of_the_run_s_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches `mlflow-sync` from another folder, which would make a store there and send the whole run to it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///a/mlflow.db?timeout=3")
    assert TrackingTarget(None, "e", "r", tmp_path).resolved_uri() == f"sqlite:///{tmp_path}/a/mlflow.db?timeout=3"
    for uri in ("http://host/x", "sqlite:////a/mlflow.db", "sqlite+pysqlite:////a%25/mlflow.db"):
        assert TrackingTarget(uri, "e", "r", tmp_path).resolved_uri() == uri


def test_sqlalchemy_reads_the_same_path() -> None:
    from sqlalchemy.engine import make_url

    assert make_url(sqlite_uri(Path(HARD, "mlflow.db"))).database == f"{HARD}/mlflow.db"


def test_a_path_holds_no_password() -> None:
    for uri in (sqlite_uri(Path("/a@b/mlflow.db")), sqlite_uri(Path(HARD, "mlflow.db"))):
        assert without_password(uri) == uri
    assert without_password("https://me:secret@host/x") == "https://host/x"


def test_a_run_in_such_a_folder_is_recorded_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training, mlflow-sync and evaluate all find the same store, and no file lies anywhere else."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "a?b" / "100%20x@y"
    target = TrackingTarget(None, "exp", "run", root)
    (tmp_path / "notes.txt").write_text("x")
    tracker = Tracker(root / "run", target, params={}, tags={}, artifacts=[tmp_path / "notes.txt"])
    tracker.log(1, {"loss/ce": 0.5})
    assert tracker.close("FINISHED", 120) == 0
    uri = read_state(root / "run/mlflow.json").uri
    assert sqlite_path(uri) == root / "mlflow.db" and (root / "mlflow.db").is_file()
    assert "0 points sent" in sync(root / "run")[0]
    assert log_scores(uri, "evaluation", "scores", {}, {"x": 1.0}, [{"id": "a"}])
    assert {file.name for file in (root / "mlartifacts").rglob("*") if file.is_file()} == {"notes.txt", "examples.json"}
    assert {path.name for path in tmp_path.iterdir()} == {"a?b", "notes.txt"}
    assert {path.name for path in (tmp_path / "a?b").iterdir()} == {"100%20x@y"}
