"""Where an exported model came from (`training.json`), and its reference in MLflow's model registry.

A registered version holds the model's folder and the hash of its weights as tags, never a copy. Its source is the
training run: servers refuse local paths.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ilvr_ds.data.shards import file_sha256
from ilvr_ds.errors import UserError, first_line
from ilvr_ds.tracking.scores import connect

ORIGIN_FILE = "training.json"
PATH_TAG, HASH_TAG = "ilvr_ds.path", "ilvr_ds.sha256"
_REFERENCE = re.compile(r"models:/([^/]+)/(\d+)")


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
    (folder / ORIGIN_FILE).write_text(json.dumps(origin, indent=1) + "\n")


def is_exported(folder: Path) -> bool:
    """Whether export wrote the folder."""
    return (folder / ORIGIN_FILE).is_file()


def read_origin(model: str) -> dict[str, Any]:
    """What write_origin noted; empty for a model that export did not write."""
    path = Path(model) / ORIGIN_FILE
    return dict(json.loads(path.read_text())) if path.is_file() else {}


def mlflow_place(model: str, experiment: str | None) -> tuple[str, str | None, str]:
    """Where an evaluation of `model` goes: the experiment, the training run it lies below, and that run's name.

    experiment: another that was asked for, where it lies below no run.
    """
    origin = read_origin(model)
    name = str(origin.get("run") or Path(model).name)
    if experiment:
        return experiment, None, name
    return origin.get("experiment") or "evaluation", origin.get("mlflow_run_id"), name


def is_reference(model: str) -> bool:
    """Whether `model` names a registered model."""
    return model.startswith("models:/")


def find_model(model: str, uri: str | None) -> str:
    """The folder of a registered model; anything else is returned unchanged. Raises UserError as `resolve` does."""
    return resolve(model, uri) if is_reference(model) else model


def check_name(name: str) -> None:
    """Raise UserError for a name that MLflow does not accept for a model."""
    if not name.strip() or "/" in name or ":" in name:
        raise UserError(f"--register '{name}': expected a name without / and :")


def register(folder: Path, name: str, uri: str | None) -> str:
    """Register an exported folder as the next version of model `name`; returns `models:/NAME/VERSION`.

    uri: the tracking address; None: that of the training run. Raises UserError if the folder names no run or the
    server refuses.
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
        raise UserError(f"--register: MLflow at {address}: {first_line(error)}") from error
    return f"models:/{name}/{version.version}"


def resolve(reference: str, uri: str | None) -> str:
    """The folder of a registered model; raises UserError if there is none or its weights have changed."""
    name, number = _parts(reference)
    client, failure = connect(_address(uri), "--model")
    try:
        tags = client.get_model_version(name, number).tags
    except failure as error:
        raise UserError(f"--model: {reference}: {first_line(error)}") from error
    if PATH_TAG not in tags:
        raise UserError(f"--model: {reference} was not registered by ilvr-ds export --register")
    folder = Path(tags[PATH_TAG])
    if not folder.is_dir():
        raise UserError(f"--model: {reference} lies in {folder}, which does not exist here")
    if weights_hash(folder) != tags[HASH_TAG]:
        raise UserError(f"--model: the weights in {folder} are not those that were registered as {reference}")
    return str(folder)


def attach(
    reference: str, uri: str | None, benchmark: str, metrics: Mapping[str, float], versions: Mapping[str, str]
) -> None:
    """Tag a registered model with an evaluation's accuracies; raises UserError if the server fails.

    versions: of the rule sets that judged, by name.
    """
    name, number = _parts(reference)
    client, failure = connect(_address(uri), "--model")
    try:
        for metric, value in metrics.items():
            if metric.endswith(("/accuracy", "/macro_mean")):
                client.set_model_version_tag(name, number, f"{benchmark}/{metric}", f"{value:.6g}")
        for rule, version in versions.items():
            client.set_model_version_tag(name, number, f"{benchmark}/{rule}/version", version)
    except failure as error:
        raise UserError(f"--model: {reference}: {first_line(error)}") from error


def weights_hash(folder: Path) -> str:
    """sha256 over the names and hashes of the weight files."""
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
