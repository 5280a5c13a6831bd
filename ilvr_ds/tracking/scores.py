"""Sends an evaluation to MLflow, on request: scores and a table of examples, as a run of their own."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ilvr_ds.errors import UserError, first_line
from ilvr_ds.tracking.names import sqlite_path

logger = logging.getLogger("ilvr_ds")
_QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}


def log_scores(
    uri: str, experiment: str, name: str, params: Mapping[str, Any], metrics: Mapping[str, float],
    examples: Sequence[Mapping[str, Any]], pictures: Sequence[Path] = (), parent: str | None = None,
    kind: str = "evaluation", files: Sequence[Path] = (), table: str = "examples.json",
) -> str | None:  # fmt: skip
    """Write a finished run; returns its id, or None if the server failed (the files on disk are the record).

    metrics: named by metric_name. parent: id of the training run; if this server has it, the new run becomes its child,
    in its experiment. kind: the tag that tells it from training runs. files: kept as they are. table: the file that
    `examples` become. Raises UserError if MLflow is not installed.
    """
    client, failure = connect(uri, "--tracking-uri")
    try:
        tags = {"kind": kind}
        experiment_id = _experiment_of(client, parent)
        if experiment_id is not None:
            tags["mlflow.parentRunId"] = str(parent)
        else:
            experiment_id = _experiment(client, uri, experiment)
        run_id = str(client.create_run(experiment_id, run_name=name, tags=tags).info.run_id)
        for key, value in params.items():
            client.log_param(run_id, key, str(value))
        for key, number in metrics.items():
            client.log_metric(run_id, key, float(number))
        if examples:
            columns = {key: [example[key] for example in examples] for key in examples[0]}
            client.log_table(run_id, columns, table)
        for picture in pictures:
            client.log_artifact(run_id, str(picture), "pictures")
        for file in files:
            client.log_artifact(run_id, str(file))
        client.set_terminated(run_id)
    except failure as error:
        logger.warning("MLflow at %s: %s; the scores are on disk", uri, first_line(error))
        return None
    return run_id


def connect(uri: str, option: str) -> tuple[Any, tuple[type[Exception], ...]]:
    """A client of the store and its registry, and the exceptions it raises when the server fails.

    Raises UserError, naming `option`, if MLflow is not installed or refuses the address.
    """
    for key, value in _QUIET.items():
        os.environ.setdefault(key, value)
    try:
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
    except ImportError as error:
        raise UserError(f"{option}: MLflow is not installed; pip install -c constraints.txt .") from error
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    try:
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    except MlflowException as error:
        raise UserError(f"{option} {uri}: {first_line(error)}") from error
    return client, (MlflowException, OSError)


def check_address(uri: str) -> None:
    """Raise UserError as `connect` does, before any work."""
    connect(uri, "--tracking-uri")


def _experiment_of(client: Any, run_id: str | None) -> str | None:
    """The experiment of a run; None if the server does not know the run."""
    from mlflow.exceptions import MlflowException

    if run_id is None:
        return None
    try:
        return str(client.get_run(run_id).info.experiment_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


def _experiment(client: Any, uri: str, name: str) -> str:
    """The experiment of this name, created if missing; a SQLite store keeps its artifacts beside it."""
    if known := client.get_experiment_by_name(name):
        return str(known.experiment_id)
    database = sqlite_path(uri)
    place = (database.parent / "mlartifacts").as_uri() if database else None
    return str(client.create_experiment(name, artifact_location=place))
