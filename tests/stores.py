"""MLflow's tables, which its migrations make in seconds: once for many runs, which find them as a second run does."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

from ilvr_ds.tracking.names import sqlite_uri


def with_tables(folder: Path) -> Path:
    """`folder`, where the next run's store, `mlflow.db`, is empty and ready; one that is there stays as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    store = folder / "mlflow.db"
    if not store.exists():
        store.write_bytes(_tables())
    return folder


@functools.cache
def _tables() -> bytes:
    from mlflow import MlflowClient

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "mlflow.db")
        MlflowClient(tracking_uri=sqlite_uri(file)).search_experiments()
        return file.read_bytes()
