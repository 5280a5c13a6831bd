from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ilvr_ds.errors import UserError
from ilvr_ds.tracking.registry import attach, mlflow_place, register, resolve


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Address of a store, and the id of a run in it."""
    from mlflow import MlflowClient

    root = tmp_path_factory.mktemp("registry")
    uri = f"sqlite:///{root / 'mlflow.db'}"
    client = MlflowClient(tracking_uri=uri)
    experiment = client.create_experiment("e", artifact_location=(root / "files").as_uri())
    return uri, client.create_run(experiment).info.run_id


def model(folder: Path, run_id: str | None, uri: str) -> Path:
    folder.mkdir()
    (folder / "model-1.safetensors").write_bytes(b"weights")
    origin = {"run": "r", "step": 3, "stage": 1, "mlflow_run_id": run_id, "experiment": "e", "tracking_uri": uri}
    (folder / "training.json").write_text(json.dumps(origin))
    return folder


def version_of(uri: str, name: str, number: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri).get_model_version(name, number)


def test_a_registered_model_is_found_and_carries_its_scores(tmp_path: Path, store: tuple[str, str]) -> None:
    uri, run = store
    folder = model(tmp_path / "model", run, uri)
    assert [register(folder, "name", None) for _ in range(2)] == ["models:/name/1", "models:/name/2"]
    assert resolve("models:/name/1", uri) == str(folder)
    attach(
        "models:/name/2", uri, "comt", {"exact/accuracy": 0.25, "exact/accuracy/a": 1.0, "speed/x": 2.0}, {"exact": "1"}
    )
    version = version_of(uri, "name", "2")
    assert version.run_id == run and version.tags["comt/exact/accuracy"] == "0.25"
    assert version.tags["comt/exact/version"] == "1"
    assert "comt/exact/accuracy/a" not in version.tags


def test_weights_that_changed_are_refused(tmp_path: Path, store: tuple[str, str]) -> None:
    """Catches scores attached to a model whose weights have changed."""
    uri, run = store
    folder = model(tmp_path / "model", run, uri)
    reference = register(folder, "changed", uri)
    (folder / "model-1.safetensors").write_bytes(b"others!")
    with pytest.raises(UserError, match="are not those that were registered"):
        resolve(reference, uri)
    (tmp_path / "model").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="does not exist here"):
        resolve(reference, uri)


@pytest.mark.parametrize(
    ("reference", "message"),
    [("models:/name", "is not models:/NAME/VERSION"), ("models:/nobody/1", "models:/nobody/1: .*not found")],
)
def test_a_wrong_reference_is_an_error(store: tuple[str, str], reference: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve(reference, store[0])


def test_an_evaluation_lies_below_its_training_run_unless_another_experiment_is_asked_for(tmp_path: Path) -> None:
    folder = str(model(tmp_path / "model", "7", "sqlite:///x"))
    assert mlflow_place(folder, None) == ("e", "7", "r")
    assert mlflow_place(folder, "other") == ("other", None, "r")
    assert mlflow_place(str(tmp_path / "base"), None) == ("evaluation", None, "base")


def test_without_an_address_or_a_run_there_is_nothing_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs a registry"):
        resolve("models:/name/1", None)
    with pytest.raises(UserError, match="does not know a run in MLflow"):
        register(model(tmp_path / "model", None, "sqlite:////a.db"), "name", None)
