"""What a run knows of its copy in MLflow: `mlflow.json`, beside the record."""

from __future__ import annotations

import json
import os
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from ilvr_ds.tracking.names import absolute, sqlite_uri
from ilvr_ds.whole_files import write_whole

KEY_TAG = "ilvr_ds.key"
PARENT_TAG = "mlflow.parentRunId"
WENT_BACK_TAG, LEFT_TAG = "ilvr_ds.went_back_from", "ilvr_ds.left_for"
"""On a run that went back to an older step: the run it left. On that run: the one that left it."""
Status = Literal["FINISHED", "FAILED", "KILLED"]


@dataclass(frozen=True)
class TrackingTarget:
    """Where the copy goes. `uri` None: MLFLOW_TRACKING_URI if set, else a SQLite file in `root`."""

    uri: str | None
    experiment: str
    run_name: str
    root: Path
    parent: str | None = None
    """Name of the parent run; other runs in `root` may share it."""

    def resolved_uri(self) -> str:
        """The tracking address, absolute."""
        return absolute(self.uri or os.environ.get("MLFLOW_TRACKING_URI") or sqlite_uri(self.root / "mlflow.db"))


@dataclass(frozen=True)
class LeftRun:
    """A run on the server that ends here, because another continues from one of its steps."""

    run_id: str
    step: int


@dataclass
class CopyState:
    """Contents of mlflow.json: what describes the run, and how far the copy has come."""

    key: str = field(default_factory=lambda: uuid.uuid4().hex)
    """The run's tag: a lost answer does not lead to a second run."""
    uri: str = ""
    """Without a password."""
    experiment: str = ""
    run_name: str = ""
    parent: str | None = None
    """Name of the parent run."""
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    artifacts: list[str] = field(default_factory=list)
    """File names beside the record, or paths."""
    datasets: list[dict[str, Any]] = field(default_factory=list)
    """For each data set: name, digest, source, context (training or evaluation) and profile (counts)."""
    left: LeftRun | None = None
    """The run that this one leaves, until the server has been told."""
    attempt: int = 0
    """Number of starts so far."""
    run_id: str | None = None
    experiment_id: str | None = None
    described: bool = False
    """Parameters and data sets have been sent."""
    filed: bool = False
    """The artifacts of the last start have been sent."""
    tagged: bool = False
    """The tags of the last start have been sent."""
    offset: int = 0
    last_steps: dict[str, int] = field(default_factory=dict)
    """Last step sent of each metric: steps repeated after a crash are not sent twice."""
    picture_offset: int = 0
    last_pictures: dict[str, int] = field(default_factory=dict)
    """Last step sent of each picture."""

    def restarted(self) -> CopyState:
        """The same run, nothing sent yet."""
        progress = ("run_id", "described", "filed", "tagged", "offset", "last_steps", "picture_offset", "last_pictures")
        return CopyState(**{name: value for name, value in vars(self).items() if name not in progress})


def read_state(path: Path) -> CopyState:
    """The state in a file; a new one if there is no file."""
    if not path.exists():
        return CopyState()
    content = json.loads(path.read_text())
    left = content.pop("left", None)
    return CopyState(**content, left=LeftRun(**left) if left else None)


def write_state(path: Path, state: CopyState) -> None:
    """Replace the file atomically."""
    write_whole(path, json.dumps(asdict(state)))
