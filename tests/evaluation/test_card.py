"""The model card of an export and the scores that evaluations put into it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ilvr_ds.cli import main
from ilvr_ds.evaluation.card import _scores, add_scores
from tests.evaluation.exporting import export_base

NONE = "None known; `ilvr-ds evaluate` adds them."


def scores_of(accuracy: float) -> dict[str, Any]:
    types = {"a": {"samples": 3}, "b": {"samples": 5}}
    return {"rules": {"strict": {"accuracy": accuracy, "macro_mean": 0.5, "types": types}}}


def test_an_evaluation_puts_its_scores_into_the_card(
    demo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The card said "None known" after it, too."""
    model = export_base(demo_folder / "model", tmp_path / "model", monkeypatch)
    assert f"## Scores\n{NONE}\n\n## Recipe" in (model / "README.md").read_text()
    data = str(demo_folder / "held_out")
    more = ["--benchmark", "comt", "--max-samples", "4", "--max-new-tokens", "2", "--output", f"{tmp_path / 'scores'}"]
    assert main(["evaluate", "--model", str(model), "--shards", data, *more]) == 0
    assert f"accuracies are in the model card, too: {model / 'README.md'}" in capsys.readouterr().out
    card = (model / "README.md").read_text()
    rules = json.loads((tmp_path / "scores/scores.json").read_text())["rules"]
    for rule in ("comt-official", "ilvr-2026-08"):
        accuracy, mean = (f"{rules[rule][key]:.4g}" for key in ("accuracy", "macro_mean"))
        assert f"| {rule} | 4 | {accuracy} | {mean} |" in card
    assert f"`comt` on `{data}`" in card and NONE not in card and "## Recipe" in card


def test_the_card_says_which_evaluation_of_the_run_it_tells(tmp_path: Path) -> None:
    """Catches free answers under the words for teacher-forced ones, and an evaluation of later weights."""
    record = tmp_path / "metrics.jsonl"
    assert _scores(record, 10) == NONE + "\n"
    found = {4: {"eval/ce": 1.5, "eval/generated": 8.0, "eval/generated_accuracy": 0.25}, 12: {"eval/ce": 1.0}}
    lines = [{"step": step, "metrics": metrics} for step, metrics in found.items()]
    record.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 2')
    assert _scores(record, 10) == (
        "Teacher-forced, on held-out samples, after step 4:\n\n- ce: 1.5\n"
        "\nAnswered freely, some of them:\n\n- generated: 8\n- generated_accuracy: 0.25\n"
    )


def test_scores_of_a_benchmark_take_the_place_of_its_own_alone(
    golden_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in a card that somebody went on writing."""
    model = export_base(golden_model, tmp_path / "model", monkeypatch)
    card = model / "README.md"
    card.write_text(card.read_text() + "\nMy own words.\n")
    before = card.read_text()
    for benchmark, accuracy in (("comt", 0.25), ("vsp", 0.75), ("comt", 0.125)):
        assert add_scores(model, benchmark, "data", scores_of(accuracy)) is not None
    text = card.read_text()
    assert "| strict | 8 | 0.125 | 0.5 |" in text and "| strict | 8 | 0.75 | 0.5 |" in text and "0.25" not in text
    assert text.count("`comt` on") == text.count("`vsp` on") == 1
    head, tail = before.split(NONE)
    assert text.startswith(head) and text.endswith(tail)
    card.write_text(text.replace("<!-- end of comt -->\n", ""))
    add_scores(model, "comt", "data", scores_of(0.5))
    assert card.read_text().endswith(tail), "nothing behind a mark that is gone is lost"


def test_what_the_card_cannot_take_is_said(golden_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = export_base(golden_model, tmp_path / "model", monkeypatch)
    card = model / "README.md"
    card.write_text("Words of another.\n")
    assert add_scores(model, "comt", "data", scores_of(0.5)) == (
        f"{card}: has no section ## Scores; the scores are not in it"
    )
    assert card.read_text() == "Words of another.\n"
    card.write_bytes(b"\xff")
    assert str(add_scores(model, "comt", "data", scores_of(0.5))).startswith(
        f"{card}: the scores are not in it ('utf-8'"
    )
    card.unlink()
    assert "are not in it ([Errno 2] No such file" in str(add_scores(model, "comt", "data", scores_of(0.5)))
    assert add_scores(golden_model, "comt", "data", scores_of(0.5)) is None, "a model from elsewhere"
