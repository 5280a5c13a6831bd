"""Evaluation's door to MLflow: scores and a table of examples as a run of their own, where that is asked for."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ilvr_ds.errors import UserError

logger = logging.getLogger("ilvr_ds")
_QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}


def log_scores(
    uri: str, experiment: str, name: str, params: Mapping[str, Any], metrics: Mapping[str, float],
    examples: Sequence[Mapping[str, Any]],
) -> str | None:  # fmt: skip
    """Write a finished run; returns its id, or None where the server failed (the files on disk are the record).

    Raises UserError where MLflow is not installed.
    """
    for key, value in _QUIET.items():
        os.environ.setdefault(key, value)
    try:
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
    except ImportError as error:
        raise UserError("--tracking-uri: MLflow is not installed; pip install mlflow") from error
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    try:
        client: Any = MlflowClient(tracking_uri=uri)
        known = client.get_experiment_by_name(experiment)
        experiment_id = known.experiment_id if known else client.create_experiment(experiment)
        run_id = str(client.create_run(experiment_id, run_name=name, tags={"kind": "evaluation"}).info.run_id)
        for key, value in params.items():
            client.log_param(run_id, key, str(value))
        for key, number in metrics.items():
            client.log_metric(run_id, re.sub(r"[^\w\-. :/]", "_", key, flags=re.ASCII), float(number))
        if examples:
            columns = {key: [example[key] for example in examples] for key in examples[0]}
            client.log_table(run_id, columns, "examples.json")
        client.set_terminated(run_id)
    except (MlflowException, OSError) as error:
        logger.warning("MLflow at %s: %s; the scores are on disk", uri, str(error).strip().splitlines()[0])
        return None
    return run_id
