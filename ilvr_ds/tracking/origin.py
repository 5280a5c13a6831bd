"""Which training run a model folder came from, and how its targets were selected: `training.json`.

Written by export, read by evaluate and audit.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FILE = "training.json"


def write_origin(folder: Path, state: dict[str, Any], checkpoint: Path) -> None:
    """Note run, step and the run's copy in MLflow beside a model that was exported from `checkpoint`."""
    run = checkpoint.parent.parent
    copy = run / "mlflow.json"
    known = json.loads(copy.read_text()) if copy.is_file() else {}
    origin = {
        "run": run.name,
        "step": state["step"],
        "stage": state["recipe"]["train"]["stage"],
        "selection": state["recipe"]["selection"],
        "mlflow_run_id": known.get("run_id") or state.get("mlflow_run_id"),
        "experiment": known.get("experiment") or state["recipe"]["tracking"]["experiment"],
        "tracking_uri": known.get("uri"),
    }
    (folder / FILE).write_text(json.dumps(origin, indent=1) + "\n")


def is_exported(folder: Path) -> bool:
    """Was the folder written by export?"""
    return (folder / FILE).is_file()


def read_origin(model: str) -> dict[str, Any]:
    """What write_origin noted; empty for models that came another way."""
    path = Path(model) / FILE
    return dict(json.loads(path.read_text())) if path.is_file() else {}
