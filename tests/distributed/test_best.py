"""A whole run that keeps its best checkpoint, answers freely in its evaluations, and ends when they get no better."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ilvr_ds.cli import main
from tests import forks
from tests.distributed.test_runs import overrides
from tests.recipes import RECIPE


def train(demo: Path, folder: Path, **changes: Any) -> str:
    """What a run on one rank says."""
    sets = [part for text in overrides(folder, demo, **changes) for part in ("--set", text)]
    result = forks.run("ilvr_ds.cli", "train", "--config", RECIPE, *sets, timeout=420)
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stderr


@pytest.mark.drill
@pytest.mark.timeout(900)
def test_the_best_is_kept_exported_and_waited_for(demo_folder: Path, tmp_path: Path) -> None:
    """The rate is so high that the loss rises: the best evaluation is not the last."""
    settings = {
        "optim__lr": 0.3, "optim__warmup_steps": 0, "optim__schedule": "constant", "train__max_steps": 12,
        "evaluation__every_steps": 1, "evaluation__generate_samples": 2, "checkpoint__keep_best": "eval/ce",
        "checkpoint__keep_last": 1, "train__patience": 2,
    }  # fmt: skip
    said = train(demo_folder, tmp_path, **settings)
    run = tmp_path / "demo"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = {line["step"]: line["metrics"] for line in lines if "eval/ce" in line.get("metrics", {})}
    best = min(found, key=lambda step: float(found[step]["eval/ce"]))
    last = max(found)
    assert last == best + 2 < 12, "two evaluations that were not better end it"
    assert all(metrics["eval/generated"] == 2 for metrics in found.values())
    names = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
    assert names == [f"step-{best:08d}", f"step-{last:08d}"]
    assert f"best eval/ce {found[best]['eval/ce']:.4f}, after step {best}: ilvr-ds export {run} --best" in said
    assert main(["export", str(run), "--best", "--to", str(tmp_path / "model")]) == 0
    assert f"optimizer steps: {best}" in (tmp_path / "model/README.md").read_text()
    assert f"nothing to do: step {last} of 12 is done" in train(demo_folder, tmp_path, **settings)


def test_a_run_without_a_best_says_how_to_have_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(tmp_path), "--best", "--to", str(tmp_path / "model")]) == 2
    assert "keeps no best checkpoint; it does with checkpoint.keep_best: eval/ce" in capsys.readouterr().err
