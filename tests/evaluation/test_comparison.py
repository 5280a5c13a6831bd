"""Models against benchmarks, on evaluations written by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from ilvr_ds.cli import main
from ilvr_ds.errors import UserError
from ilvr_ds.evaluation.comparison import compare_scores, markdown, terminal_lines
from ilvr_ds.evaluation.intervals import effect

RULE, OTHER = "comt-official", "option-letter"


def write(
    folder: Path, verdicts: Sequence[int], *, model: str = "trained", latent_size: int = 4, benchmark: str = "comt",
    version: str | None = "1", first: int = 0, **settings: Any,
) -> Path:  # fmt: skip
    """A finished evaluation whose second rule set says the opposite of the first."""
    folder.mkdir(parents=True)
    settings = {"model": model, "data": "d" * 64, "latent_size": latent_size, "benchmark": benchmark, **settings}
    part = {"version": version} if version else {}
    scores = {"settings": settings, "rules": {RULE: part, OTHER: {"version": "1"}}}
    (folder / "scores.json").write_text(json.dumps(scores))
    lines = [
        {"number": number, "verdicts": {RULE: bool(right), OTHER: not right}}
        for number, right in enumerate(verdicts, start=first)
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


BASE, TRAINED = [1, 0, 0, 0, 1, 0, 0, 0] * 4, [1, 1, 1, 0, 1, 1, 0, 0] * 4


@pytest.fixture
def both(tmp_path: Path) -> list[Path]:
    base = write(tmp_path / "base", BASE, model="Qwen/base", latent_size=0, mode="cot")
    return [write(tmp_path / "trained", TRAINED), base]


def test_the_base_is_the_first_line_and_others_are_paired_with_it(both: list[Path]) -> None:
    """Given last, it is shown first. Catches intervals of unpaired shares."""
    expected = effect([bool(x) for x in BASE], [bool(x) for x in TRAINED])
    lines = terminal_lines(compare_scores(both))
    assert lines[0].split("  ")[-1] == "comt: comt-official, n 32"
    assert lines[1].split() == ["Qwen/base", "(cot)", "0.250"]
    cell = f"0.625  {0.375:+.3f} [{expected.low:+.3f}, {expected.high:+.3f}]"
    assert lines[2].split("  ", 1) == ["trained", cell.rjust(len(lines[2]) - len("trained  "))]
    assert expected.low > 0
    assert lines[3].startswith("differences to Qwen/base (cot) on the same samples")
    assert lines[4] == "judged by comt-official version 1"


def test_columns_are_benchmarks_and_a_missing_cell_is_empty(both: list[Path], tmp_path: Path) -> None:
    vsp = write(tmp_path / "vsp", [1, 1], benchmark="vsp", data="e")
    header, base, trained, *_ = terminal_lines(compare_scores([*both, vsp]))
    assert "comt: comt-official, n 32" in header and "vsp: comt-official, n 2" in header
    assert base.split()[-1] == "-" and trained.split()[-1] == "1.000", "the first line has none to compare with"


def test_columns_that_the_first_line_lacks_are_named(tmp_path: Path) -> None:
    """Catches differences that are missing in silence: the base's weights were written again between its evaluations,
    so that they stand in two lines, and the second has nothing to be compared with."""
    base = [
        write(tmp_path / name, BASE, model="base", latent_size=0, benchmark=name, weights=[["w", 1, number]])
        for number, name in enumerate(("comt", "vsp"))
    ]
    trained = [write(tmp_path / f"trained-{name}", TRAINED, benchmark=name) for name in ("comt", "vsp")]
    table = compare_scores([*base, *trained])
    lines = terminal_lines(table)
    said = "base has no evaluation of vsp (comt-official): no differences are shown there"
    assert lines[4].startswith("differences to base on the same samples") and lines[5] == said
    assert f"- {said}" in markdown(table).splitlines()
    assert lines[3].split("  ")[-1].strip() == "0.625", "that of the trained model on vsp"
    alone = terminal_lines(compare_scores(base[:1]))
    whole = terminal_lines(compare_scores([base[0], trained[0]]))
    assert not any("no differences" in line for line in (*alone, *whole))


def test_one_benchmark_on_two_data_sets_has_two_columns(both: list[Path], tmp_path: Path) -> None:
    more = write(tmp_path / "more", [1], data="0123456789")
    header = terminal_lines(compare_scores([*both, more]))[0]
    assert "comt on data dddddddd: comt-official" in header and "comt on data 01234567: comt-official" in header


def test_rule_sets_are_chosen_by_name(both: list[Path]) -> None:
    lines = terminal_lines(compare_scores(both, [OTHER, RULE]))
    assert lines[1].split()[-2:] == ["0.250", "0.750"]
    assert lines[-1] == "judged by comt-official version 1, option-letter version 1"
    with pytest.raises(UserError, match="--rule: no evaluation was judged by 'option'; did you mean 'option-lett"):
        compare_scores(both, ["option"])


def test_one_model_evaluated_twice_has_two_lines(both: list[Path], tmp_path: Path) -> None:
    """Other settings, or other weights in the same folder."""
    again = write(tmp_path / "again", BASE, weights=[["model.safetensors", 1, 2]])
    names = [row.name for row in compare_scores([*both, again]).rows]
    assert names == ["Qwen/base (cot)", "trained", f"trained in {again}"]
    vsp = write(tmp_path / "vsp", BASE, benchmark="vsp", weights=[["model.safetensors", 1, 2]])
    table = compare_scores([both[0], again, vsp])
    assert [len(row.cells) for row in table.rows] == [1, 2], "a model's benchmarks stand in its own line"


def test_settings_that_are_not_the_same_are_said(tmp_path: Path) -> None:
    """A model whose answers were cut off at other lengths, or that saw smaller images, is not the worse one for it."""
    settings = [
        {"max_new_tokens": 64, "temperature": 0.0, "forbidden": [1]},
        {"max_new_tokens": 1024, "temperature": 0.0},
    ]
    base = write(tmp_path / "base", BASE, model="base", mode="cot", max_image_pixels=9, generation=settings[0])
    trained = write(tmp_path / "trained", TRAINED, max_image_pixels=9, generation=settings[1])
    unknown = write(tmp_path / "older", TRAINED, model="older")
    lines = terminal_lines(compare_scores([base, trained, unknown]))
    assert lines[-1] == "not the same max_new_tokens: 64 of base (cot); 1024 of trained"
    assert sum("not the same" in line for line in lines) == 1


def test_the_evaluations_of_a_model_are_found_in_its_folder(both: list[Path], tmp_path: Path) -> None:
    for benchmark in ("comt", "vsp"):
        write(tmp_path / "model/evaluation" / benchmark, TRAINED, benchmark=benchmark)
    (tmp_path / "model/evaluation/audit-comt").mkdir()
    assert [column[0] for column in compare_scores([tmp_path / "model"]).columns] == ["comt", "vsp"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": "2"}, "other: judged by comt-official version 2, .*base by version 1; start the evaluation with"),
        (
            {"version": None},
            "other: judged by rules .* was called comt-official is option-letter now.*; start the same",
        ),
        ({"first": 1}, r"other: has other samples than .*base \(32 and 32, from the same data\)"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    both: list[Path], tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    other = write(tmp_path / "other", TRAINED, **changes)
    with pytest.raises(UserError, match=words):
        compare_scores([both[1], other])


def test_a_folder_that_evaluate_did_not_write_is_a_mistake(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", BASE)
    (folder / "scores.json").write_text("{}")
    with pytest.raises(UserError, match="a: is not what `ilvr-ds evaluate` writes"):
        compare_scores([folder])
    (folder / "samples.jsonl").unlink()
    with pytest.raises(UserError, match=r"samples.jsonl: cannot be read \(No such file"):
        compare_scores([folder])


def test_markdown_has_the_same_cells(both: list[Path]) -> None:
    table = compare_scores(both)
    lines = markdown(table).splitlines()
    assert lines[:3] == ["| model | comt: comt-official, n 32 |", "| --- | --- |", "| Qwen/base (cot) | 0.250 |"]
    assert lines[3].startswith("| trained | 0.625  +0.375 [+0.")
    assert [line.removeprefix("- ") for line in lines[5:]] == terminal_lines(table)[3:]


def test_the_command_writes_terminal_markdown_and_mlflow(
    both: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uri, file = f"sqlite:///{tmp_path / 'mlflow.db'}", tmp_path / "table.md"
    command = ["compare", *map(str, both), "--markdown", str(file), "--tracking-uri", uri]
    assert main(command) == 0
    assert capsys.readouterr().out.splitlines()[:-1] == terminal_lines(compare_scores(both))[:-1]
    assert file.read_text() == markdown(compare_scores(both))
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    [run] = client.search_runs([client.get_experiment_by_name("evaluation").experiment_id])
    assert run.info.run_name == "comparison" and run.data.tags["kind"] == "comparison"
    assert run.data.metrics["comt/comt-official/accuracy/trained"] == 0.625
    assert run.data.metrics["comt/comt-official/difference/trained"] == 0.375
    assert run.data.params["judges"] == "comt-official version 1"
    files = [artifact.path for artifact in client.list_artifacts(run.info.run_id)]
    assert files == ["comparison.json", "comparison.md"]


def test_runs_and_evaluations_are_not_mixed(
    both: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", str(both[0]), str(tmp_path)]) == 2
    assert f"{tmp_path}: holds no evaluation, unlike the others" in capsys.readouterr().err
    assert main(["compare", str(tmp_path), "--rule", RULE]) == 2
    assert "holds no evaluation, which --rule, --markdown and --tracking-uri are for" in capsys.readouterr().err
    assert main(["compare", *map(str, both), "--markdown", f"{tmp_path}/none/a.md"]) == 2
    assert "cannot be written (No such file" in capsys.readouterr().err
