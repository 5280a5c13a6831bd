"""MLflow's model registry holds references: where an exported model lies and the hash of its weights, never a copy.

The source of a version is its training run, because servers refuse local paths; the folder stands in a tag.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ilvr_ds.data.shards import file_sha256
from ilvr_ds.errors import UserError
from ilvr_ds.tracking.origin import read_origin
from ilvr_ds.tracking.scores import connect

PATH_TAG, HASH_TAG = "ilvr_ds.path", "ilvr_ds.sha256"
_REFERENCE = re.compile(r"models:/([^/]+)/(\d+)")


def is_reference(model: str) -> bool:
    """Does `model` name a registered model?"""
    return model.startswith("models:/")


def find_model(model: str, uri: str | None) -> str:
    """`model`, or the folder of the registered model that it names. Raises UserError as `resolve` does."""
    return resolve(model, uri) if is_reference(model) else model


def check_name(name: str) -> None:
    """Raise UserError for a name that MLflow gives no model."""
    if not name.strip() or "/" in name or ":" in name:
        raise UserError(f"--register '{name}': expected a name without / and :")


def register(folder: Path, name: str, uri: str | None) -> str:
    """Make the next version of model `name` from an exported folder; returns its reference, `models:/NAME/VERSION`.

    uri: the tracking address; None: that of the training run. Raises UserError where the folder knows no run, or
    the server does not take it.
    """
    origin = read_origin(str(folder))
    run, address = origin.get("mlflow_run_id"), uri or origin.get("tracking_uri")
    if not run or not address:
        raise UserError(f"--register: {folder} does not know a run in MLflow; send it first: ilvr-ds mlflow-sync RUN")
    client, failure = connect(address, "--register")
    tags = {PATH_TAG: str(folder.resolve()), HASH_TAG: weights_hash(folder), "step": str(origin["step"])}
    try:
        if not client.search_registered_models(f"name = '{name}'"):
            client.create_registered_model(name)
        version = client.create_model_version(name, source=f"runs:/{run}/model", run_id=run, tags=tags)
    except failure as error:
        raise UserError(f"--register: MLflow at {address}: {_first_line(error)}") from error
    return f"models:/{name}/{version.version}"


def resolve(reference: str, uri: str | None) -> str:
    """The folder of a registered model; raises UserError where there is none, or its weights are others by now."""
    name, number = _parts(reference)
    client, failure = connect(_address(uri), "--model")
    try:
        tags = client.get_model_version(name, number).tags
    except failure as error:
        raise UserError(f"--model: {reference}: {_first_line(error)}") from error
    if PATH_TAG not in tags:
        raise UserError(f"--model: {reference} was not registered by ilvr-ds export --register")
    folder = Path(tags[PATH_TAG])
    if not folder.is_dir():
        raise UserError(f"--model: {reference} lies in {folder}, which does not exist here")
    if weights_hash(folder) != tags[HASH_TAG]:
        raise UserError(f"--model: the weights in {folder} are not those that were registered as {reference}")
    return str(folder)


def attach(reference: str, uri: str | None, benchmark: str, metrics: Mapping[str, float]) -> None:
    """Write an evaluation's accuracies to a registered model as tags; raises UserError where the server fails."""
    name, number = _parts(reference)
    client, failure = connect(_address(uri), "--model")
    try:
        for metric, value in metrics.items():
            if metric.endswith(("/accuracy", "/macro_mean")):
                client.set_model_version_tag(name, number, f"{benchmark}/{metric}", f"{value:.6g}")
    except failure as error:
        raise UserError(f"--model: {reference}: {_first_line(error)}") from error


def weights_hash(folder: Path) -> str:
    """sha256 over names and sha256 of the weight files."""
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])
    return hashlib.sha256("".join(f"{file.name} {file_sha256(file)}\n" for file in files).encode()).hexdigest()


def _parts(reference: str) -> tuple[str, str]:
    found = _REFERENCE.fullmatch(reference)
    if not found:
        raise UserError(f"--model: '{reference}' is not models:/NAME/VERSION with a number as version")
    return found[1], found[2]


def _address(uri: str | None) -> str:
    if not uri:
        raise UserError("--model: models:/ needs a registry; give --tracking-uri or set MLFLOW_TRACKING_URI")
    return uri


def _first_line(error: Any) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
