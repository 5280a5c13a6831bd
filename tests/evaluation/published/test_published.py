"""`evaluate --benchmark` on copies of the published data sets, from the command line to scores.json."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ilvr_ds.cli import main
from ilvr_ds.evaluation.published.table import PUBLISHED
from tests.evaluation.latent_model import build_latent_model
from tests.evaluation.published import copies


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_latent_model(tmp_path_factory.mktemp("latent") / "model", "What is the colour of thing 1?")


def command(model: Path, name: str, output: Path, *more: str) -> list[str]:
    fixed = ["--output", str(output), "--max-new-tokens", "6", "--precision", "fp32"]
    return ["evaluate", "--model", str(model), "--benchmark", name, *fixed, *more]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_model_with_latents_is_scored(
    name: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copies.COPIES[name](tmp_path / "data")
    assert main(command(model, name, tmp_path / "out", "--data", str(folder))) == 0
    said = capsys.readouterr().out
    scores = json.loads((tmp_path / "out/scores.json").read_text())
    assert list(scores["rules"]) == list(scores["reported"]) == list(PUBLISHED[name].rules)
    assert all(f"{rule}: " in said for rule in PUBLISHED[name].rules)
    assert scores["latents"]["answers_with_segments"] > 0
    lines = [json.loads(line) for line in (tmp_path / "out/samples.jsonl").read_text().splitlines()]
    assert len(lines) == len({line["id"] for line in lines}) == scores["settings"]["samples"]
    for rule in PUBLISHED[name].rules:
        assert scores["rules"][rule]["accuracy"] == sum(line["verdicts"][rule] for line in lines) / len(lines)


def test_it_goes_on_only_with_the_same_data(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copies.vstar(tmp_path / "data")
    few = ("--data", str(folder), "--max-samples", "2")
    assert main(command(model, "vstar", tmp_path / "out", *few)) == 0
    assert main(command(model, "vstar", tmp_path / "out", *few)) == 0
    file = folder / "test_questions.jsonl"
    file.write_text(file.read_text().replace("thing 7", "thing 8"))
    capsys.readouterr()
    assert main(command(model, "vstar", tmp_path / "out", *few)) == 2
    assert "holds an evaluation with another data" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "more", "words"),
    [
        ("vstar", ("--shards", "somewhere"), "--shards: vstar is read from its own data set"),
        ("comt", ("--data", "somewhere"), "--data: is for published benchmarks"),
        ("comt", (), "--shards: is missing; comt is judged on a data set that `ilvr-ds pack` wrote"),
        ("vstr", (), "--benchmark: 'vstr' is unknown; did you mean 'vstar'?"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_loaded(
    name: str, more: tuple[str, ...], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(tmp_path / "no-model", name, tmp_path / "out", *more)) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
