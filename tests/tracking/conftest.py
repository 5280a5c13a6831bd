"""A folder for each run, in one store."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One root for all tests: making the tables of a store takes seconds."""
    return tmp_path_factory.mktemp("outputs")


@pytest.fixture(autouse=True)
def no_other_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def folder(store: Path, request: pytest.FixtureRequest) -> Path:
    name: str = request.node.name
    return store / name.replace("[", "-").strip("]")
