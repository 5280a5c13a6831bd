"""The parent run of a sweep's runs: jobs that start at the same time agree on one, whoever comes first."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

PARENT_TAG = "ilvr_ds.parent"
"""Marks a parent run, by a digest of its name and place."""


def parent_run(
    client: Any, experiment_id: str, name: str, folder: Path, server: str, exists: Callable[[Any, str], bool]
) -> str:
    """MLflow's id of the parent run called `name` in an experiment; creates it if needed.

    folder: shared by all children. A file there, which only one of them can create, holds the run's id; whoever comes
    second deletes the run it has just created. server: its address without a password. exists: whether the client's
    server has a run with this id. Raises whatever MLflow or the file system raises.
    """
    key = hashlib.sha256(f"{server} {experiment_id} {name}".encode()).hexdigest()[:16]
    decision = folder / f".mlflow-parent-{key}"
    if decision.exists() and exists(client, decided := decision.read_text()):
        return decided
    found = _find(client, experiment_id, key)
    mine = found or _make(client, experiment_id, name, key)
    proposal = decision.with_name(f"{decision.name}.{uuid.uuid4().hex}")
    proposal.write_text(mine)
    if decision.exists() and not exists(client, decision.read_text()):
        proposal.replace(decision)  # the run was deleted on the server
        return mine
    try:
        decision.hardlink_to(proposal)  # atomic on network file systems too, which may have no locks
    except FileExistsError:
        decided = decision.read_text()
        if decided != mine and not found:
            client.delete_run(mine)
        return decided
    finally:
        proposal.unlink()
    return mine


def _find(client: Any, experiment_id: str, key: str) -> str | None:
    """A run created by a process that ended before it could write its id down."""
    found = client.search_runs([experiment_id], f"tags.`{PARENT_TAG}` = '{key}'")
    return str(found[0].info.run_id) if found else None


def _make(client: Any, experiment_id: str, name: str, key: str) -> str:
    run_id = str(client.create_run(experiment_id, run_name=name, tags={PARENT_TAG: key}).info.run_id)
    client.set_terminated(run_id)  # it only holds its children together
    return run_id
