"""A checkpoint that an older version wrote."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from tests import forks
from tests.ranks import free_port, rank_environment

ARCHIVE = Path(__file__).parent / "old/run.tar.xz"


def test_a_run_of_an_older_version_goes_on_to_its_own_losses(tmp_path: Path) -> None:
    """Catches keys that were renamed, defaults that moved, and weights, moments or averages that are read otherwise."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    expected = json.loads((tmp_path / "expected.json").read_text())
    changes = {**expected["changes"], "deepspeed.config": "zero3", "checkpoint.resume": "must"}
    sets = [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
    environment = rank_environment(0, 1, free_port())
    ended = forks.run("ilvr_ds.cli", "train", "--config", "recipe.yaml", *sets, env=environment, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    lines = [json.loads(line) for line in (tmp_path / "demo/metrics.jsonl").read_text().splitlines()]
    found = {line["step"]: line["metrics"] for line in lines if "loss/ce" in line.get("metrics", {})}
    assert sorted(found) == sorted(map(int, expected["metrics"]))
    for step, metrics in expected["metrics"].items():
        for name, value in metrics.items():
            assert found[int(step)][name] == pytest.approx(value, rel=1e-4, abs=1e-6), (step, name)
