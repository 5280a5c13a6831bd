"""Sends to MLflow later what a run could not send while it ran."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar, cast

from ilvr_ds.errors import UserError
from ilvr_ds.tracking.mlflow_copy import MlflowCopy, Status, TrackingTarget, read_state, without_password
from ilvr_ds.tracking.names import sqlite_path
from ilvr_ds.tracking.record import read_record

T = TypeVar("T")
PAUSES_S = (1.0, 3.0)
"""Between tries."""


def sync(directory: Path, uri: str | None = None) -> list[str]:
    """Send what MLflow lacks of the run in `directory`, and of earlier tries beside it; returns lines that say what.

    `uri` replaces the address that the run had. Sends nothing twice, whoever else is sending. Raises UserError where
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
    return f"{record.name}: {sent} points sent to {without_password(address)}, run {copy.state.run_id}; all are there"


def _try(action: Callable[[], T], copy: MlflowCopy, address: str) -> T:
    """What `action` returns, tried a few times; raises UserError where the server does not take it."""
    for pause in (*PAUSES_S, None):
        try:
            return action()
        except Exception as error:  # MLflow raises what its stores and transports raise
            if pause is None:
                reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                raise UserError(
                    f"MLflow at {address}: {reason}; {copy.unsent()} lines of {copy.record} are not there yet, "
                    f"start this again when the server is back"
                ) from error
            time.sleep(pause)
    raise AssertionError("the last try returns or raises")


def _address(known: str, given: str | None) -> str:
    """The address to send to: the one given, else the run's; a password stands only in MLFLOW_TRACKING_URI."""
    set_here = os.environ.get("MLFLOW_TRACKING_URI")
    if given:
        return given
    return set_here if set_here and without_password(set_here) == known else known


def _end(record: Path) -> Status | None:
    """How the run ended, where its record ends with that; a run that still goes on keeps its mark."""
    last = max(read_record(record), key=lambda read: read[1], default=({}, 0))[0]
    return cast(Status, last["status"]) if last.get("event") == "end" else None
