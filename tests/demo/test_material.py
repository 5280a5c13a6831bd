"""What `ilvr-ds demo-data` writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import ilvr_ds
from ilvr_ds.cli import main
from ilvr_ds.demo.material import TRAINED

ARGUMENTS = ["demo-data", "--train", "5", "--held-out", "2", "--output"]


@pytest.mark.parametrize(
    ("more", "groups", "latents"),
    [
        ([], {"creation", "deletion", "update", "selection"}, 2),
        (["--operations", "trail", "--grid", "6", "--signs", "9"], {"trail"}, 9),
        (["--operations", "trail"], {"trail"}, 6),
        (["--operations", "look"], {"look"}, 0),
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
        (["--family", "qwen3_lv"], "no family of models 'qwen3_lv'; did you mean 'qwen3_vl'?"),
        (["--family", "qwen3_vl", "--grid", "6"], "grid: 6 cells of 28 pixels become 5 merged patches of 32"),
        (["--trained", "--size", "mini"], "--size: not with --trained, whose model follows trails of 3 signs"),
    ],
)
def test_mistakes_write_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], words: str
) -> None:
    assert main([*ARGUMENTS, str(tmp_path / "demo"), *more]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


def test_the_trained_model_lives_on_its_latents(tmp_path: Path) -> None:
    """Catches a model that the code has left behind: its free answers are right."""
    held_out, benchmark = 32, "option-letter"
    arguments = ["demo-data", "--trained", "--train", "2", "--held-out", str(held_out), "--output", str(tmp_path)]
    assert main(arguments) == 0
    model = ilvr_ds.load(str(tmp_path / "model"), device="cpu", precision="fp32")
    records = [json.loads(line) for line in (tmp_path / "task/held_out.jsonl").read_text().splitlines()]
    pairs = [(tmp_path / "task" / record["image_input"][0], record["text_input"]) for record in records]
    replies = model.ask_all(pairs, batch_size=held_out, max_new_tokens=60)
    right = [
        ilvr_ds.judge(reply.text, record["original_final_answer"], record["text_input"], benchmark)[benchmark]
        for reply, record in zip(replies, records, strict=True)
    ]
    assert sum(right) >= held_out - 1
    assert all(reply.steps == (1, 1, 1) for reply in replies)


def test_the_trained_model_is_small() -> None:
    assert sum(file.stat().st_size for file in TRAINED.iterdir()) < 3e6
