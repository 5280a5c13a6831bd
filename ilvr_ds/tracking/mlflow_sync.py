"""Sends to MLflow what a run could not send while it ran."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar, cast

from ilvr_ds.errors import UserError, first_line
from ilvr_ds.tracking.mlflow_copy import MlflowCopy
from ilvr_ds.tracking.mlflow_state import Status, TrackingTarget, read_state
from ilvr_ds.tracking.names import sqlite_path, without_password
from ilvr_ds.tracking.record import read_record

T = TypeVar("T")
PAUSES_S = (1.0, 3.0)
"""Between attempts."""


def sync(directory: Path, uri: str | None = None) -> list[str]:
    """Send what MLflow lacks of the run in `directory` and of its earlier attempts; returns one line for each.

    `uri` replaces the run's address. Sends nothing twice, even while another process is sending. Raises UserError if
    there is no run or the server cannot be reached.
    """
    states = sorted(directory.glob("mlflow*.json"))
    if not states:
        raise UserError(f"{directory}: holds no mlflow.json; give the folder of a run")
    return [_sync(path, uri) for path in states]


def _sync(state_file: Path, uri: str | None) -> str:
    record = state_file.with_name(state_file.name.replace("mlflow", "metrics", 1) + "l")
    state = read_state(state_file)
    root = state_file.parent.parent
    target = TrackingTarget(_address(state.uri, uri), state.experiment, state.run_name, root, state.parent)
    address = target.resolved_uri()
    if (database := sqlite_path(address)) and not database.parent.is_dir():
        raise UserError(f"{state_file}: the folder of {address} does not exist; give the server with --uri")
    copy = MlflowCopy(record, state_file, target)
    sent = _try(copy.send, copy, without_password(address))
    if status := _end(record):
        _try(lambda: copy.end(status), copy, without_password(address))
    return f"{record.name}: {sent} points sent to {without_password(address)}, run {copy.state.run_id}; complete"


def _try(action: Callable[[], T], copy: MlflowCopy, address: str) -> T:
    """Call `action`, with retries; raises UserError when the last one fails."""
    for pause in (*PAUSES_S, None):
        try:
            return action()
        except Exception as error:  # MLflow raises what its stores and transports raise
            if pause is None:
                raise UserError(
                    f"MLflow at {address}: {first_line(error)}; {copy.unsent()} lines of {copy.record} are not sent; "
                    f"run this again when the server is back"
                ) from error
            time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


def _address(known: str, given: str | None) -> str:
    """The address to send to: the given one, else the run's, with the password that only MLFLOW_TRACKING_URI holds."""
    set_here = os.environ.get("MLFLOW_TRACKING_URI")
    if given:
        return given
    return set_here if set_here and without_password(set_here) == known else known


def _end(record: Path) -> Status | None:
    """How the run ended, if its record says so; a run that still goes on keeps its status."""
    last = max(read_record(record), key=lambda read: read[1], default=({}, 0))[0]
    return cast(Status, last["status"]) if last.get("event") == "end" else None
