from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ilvr_ds.cli import main


@pytest.fixture(scope="session")
def planted_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model`, and packed data: `data` of 24 samples, `plain` without helper images."""
    from ilvr_ds.ingest.pack import pack_samples
    from tests.audit.planted import planted_samples, write_planted

    folder = tmp_path_factory.mktemp("planted")
    write_planted(folder / "model")
    pack_samples(planted_samples(24), folder / "data")
    pack_samples(planted_samples(12, with_helpers=False), folder / "plain")
    return folder


@pytest.fixture
def audit_of(planted_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Audits a planted case with more options; returns audit.json, {} where there is none, after that exit code."""
    from ilvr_ds.evaluation import preparation
    from tests.audit.planted import planted_reasoner

    def audit(case: str, *more: str, data: str = "data", output: str = "out", code: int = 0) -> dict[str, Any]:
        reasoner = planted_reasoner(planted_folder / "model", case)
        monkeypatch.setattr(preparation, "load_reasoner", lambda *_, **__: reasoner)
        shards, out = planted_folder / data, tmp_path / output
        fixed = ["--batch-size", "12", "--max-new-tokens", "14", "--output", f"{out}", "--benchmark", "comt"]
        command = ["audit", "--model", f"{planted_folder / 'model'}", "--shards", f"{shards}", *fixed, *more]
        assert main(command) == code
        file = out / "audit.json"
        report: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
        return report

    return audit
