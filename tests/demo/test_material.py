"""What `ilvr-ds demo-data` writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ilvr_ds.cli import main

ARGUMENTS = ["demo-data", "--train", "5", "--held-out", "2", "--output"]


@pytest.mark.parametrize(
    ("more", "groups", "latents"),
    [
        ([], {"creation", "deletion", "update", "selection"}, 2),
        (["--operations", "trail", "--grid", "6", "--signs", "9"], {"trail"}, 9),
        (["--operations", "trail"], {"trail"}, 6),
    ],
)
def test_the_operations_that_are_asked_for(tmp_path: Path, more: list[str], groups: set[str], latents: int) -> None:
    assert main([*ARGUMENTS, str(tmp_path / "demo"), *more]) == 0
    records = [json.loads(line) for line in (tmp_path / "demo/task/train.jsonl").read_text().splitlines()]
    assert {record["group"] for record in records} == groups
    steps = [step for step in records[0]["sequence_plan"] if step["type"] == "latent"]
    assert len(steps) == latents
    assert all(("region" in step) == (groups == {"trail"}) for step in steps)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--operations", "trial"], "operations: 'trial' is unknown; did you mean 'trail'?"),
        (["--operations", "trail", "--signs", "15"], "signs: 15; choose 1 to 14 on a grid of 4"),
        (["--signs", "3"], "signs: 3, but only a trail has signs; add --operations trail"),
    ],
)
def test_mistakes_write_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], words: str
) -> None:
    assert main([*ARGUMENTS, str(tmp_path / "demo"), *more]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()
