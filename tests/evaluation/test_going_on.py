"""Evaluations that are killed, told to stop, or made by several ranks or by rows that are refilled."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ilvr_ds.cli import main
from ilvr_ds.evaluation import evaluate as module
from ilvr_ds.evaluation import preparation
from ilvr_ds.generation.decoder import Decoder
from ilvr_ds.owner import read_owner
from tests.evaluation.evaluating import arguments, lines_of, scores_of
from tests.forks import Fork
from tests.ranks import start_ranks


@pytest.mark.drill
def test_a_killed_evaluation_goes_on_where_it_was(
    model: Path, demo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed in its second batch, with a torn last line and a half batch on disk: the result is that of one piece."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main(arguments(model, demo_folder, whole, "--ablate-latents")) == 0
    assert "comt-official" in capsys.readouterr().out
    answered: list[range] = []
    answer = module._Run.answer

    def dying(self: Any, batch: range) -> Any:
        answered.append(batch)
        if len(answered) == 2:
            raise KeyboardInterrupt
        return answer(self, batch)

    monkeypatch.setattr(module._Run, "answer", dying)
    with pytest.raises(KeyboardInterrupt):
        main(arguments(model, demo_folder, killed, "--ablate-latents"))
    part = killed / "part-00000.jsonl"
    assert len(part.read_text().splitlines()) == 5 and not (killed / "scores.json").exists()
    part.write_bytes(part.read_bytes()[:-20])
    answered.append(range(0))
    assert main(arguments(model, demo_folder, killed, "--ablate-latents")) == 0
    assert lines_of(killed) == lines_of(whole)
    assert answered[3:] == [range(0, 5), range(5, 10), range(10, 16)]
    assert main(arguments(model, demo_folder, killed, "--ablate-latents")) == 0
    assert len(answered) == 6, "a finished evaluation answers nothing again"
    before, after = (json.loads((folder / "scores.json").read_text()) for folder in (whole, killed))
    assert before["rules"] == after["rules"] and before["ablation"] == after["ablation"]


def test_two_ranks_answer_what_one_answers_also_after_a_kill(model: Path, demo_folder: Path, tmp_path: Path) -> None:
    """Catches batches that no rank or two ranks answer, and answers that a kill -9 loses or doubles."""
    assert main(arguments(model, demo_folder, tmp_path / "one")) == 0

    def start() -> list[Fork]:
        return start_ranks(2, tmp_path, "ilvr_ds.cli", *arguments(model, demo_folder, tmp_path / "two"))

    part = tmp_path / "two/part-00001.jsonl"
    ranks = start()
    deadline = time.monotonic() + 200
    while not (part.exists() and part.read_bytes().count(b"\n") >= 5) and time.monotonic() < deadline:
        time.sleep(0.02)
    for rank in ranks:
        rank.kill()
        rank.wait()
    assert part.read_bytes().count(b"\n") >= 5
    assert [rank.wait(200) for rank in start()] == [0, 0]
    assert lines_of(tmp_path / "two") == lines_of(tmp_path / "one")


def test_a_signal_drops_the_batch_in_hand_and_keeps_the_rest(
    model: Path, demo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C in the second batch. Catches a traceback, an answer that is lost, and a batch of an hour that is awaited
    for as long as schedulers wait."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert main(arguments(model, demo_folder, whole)) == 0
    answer = module._Run.answer

    def hearing(self: Any, batch: range) -> Any:
        if batch.start == 5:
            signal.raise_signal(signal.SIGINT)
            time.sleep(60)
        return answer(self, batch)

    monkeypatch.setattr(module._Run, "answer", hearing)
    capsys.readouterr()
    assert main(arguments(model, demo_folder, stopped, "--stop-exit-code", "85")) == 85
    said = [line for line in capsys.readouterr().err.splitlines() if "stopped" in line]
    assert "5 of 16 samples" in said[0] and str(stopped) in said[0] and "start the same command again" in said[0]
    assert (stopped / "part-00000.jsonl").read_text().count("\n") == 5 and not (stopped / "scores.json").exists()
    monkeypatch.setattr(module._Run, "answer", answer)
    assert main(arguments(model, demo_folder, stopped)) == 0
    assert lines_of(stopped) == lines_of(whole)


@pytest.fixture
def with_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, but without graphs."""
    load = preparation.load_reasoner

    def loading(*arguments: Any) -> Any:
        reasoner = load(*arguments)
        return replace(reasoner, decoder=Decoder(reasoner))

    monkeypatch.setattr(preparation, "load_reasoner", loading)


def test_refilled_rows_answer_what_batches_answer_and_stop_at_a_signal(
    model: Path, demo_folder: Path, tmp_path: Path, request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Catches an answer that is another sample's, one that is lost or answered twice, and tokens that nobody counts."""
    batches, rows = tmp_path / "batches", tmp_path / "rows"
    assert main(arguments(model, demo_folder, batches)) == 0
    request.getfixturevalue("with_decoder")
    line_of, seen = module._Run._line, []

    def hearing(self: Any, number: int, *rest: Any) -> Any:
        seen.append(number)
        if len(seen) == 4:
            signal.raise_signal(signal.SIGINT)
            time.sleep(60)
        return line_of(self, number, *rest)

    monkeypatch.setattr(module._Run, "_line", hearing)
    assert main(arguments(model, demo_folder, rows, "--stop-exit-code", "85")) == 85
    assert "3 of 16 samples" in capsys.readouterr().err
    assert main(arguments(model, demo_folder, rows)) == 0
    assert lines_of(rows) == lines_of(batches)
    assert sorted(seen) == sorted([*range(16), seen[3]]), "the answer in hand is dropped, and no other"
    tokens = [scores_of(folder)["speed"]["decode_tokens"] for folder in (batches, rows)]
    assert tokens[1] == pytest.approx(tokens[0], abs=24 * 5), "what was not written down is not counted"


def test_an_evaluation_goes_on_inside_a_batch(model: Path, demo_folder: Path, tmp_path: Path) -> None:
    """Two lines and a torn third of a batch of five are on disk: the others are answered, and none twice. Catches a
    batch that counts as done with its first line, and answers that are written again."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    few = ("--max-samples", "7")
    assert main(arguments(model, demo_folder, whole, *few)) == 0
    killed.mkdir()
    shutil.copy(whole / "settings.json", killed)
    answered = (whole / "part-00000.jsonl").read_bytes().splitlines(keepends=True)
    assert len(answered) == 7
    part = killed / "part-00000.jsonl"
    part.write_bytes(answered[0] + answered[1] + answered[2][:-20])
    assert main(arguments(model, demo_folder, killed, *few)) == 0
    assert lines_of(killed) == lines_of(whole)
    assert [json.loads(line)["number"] for line in part.read_text().splitlines()] == list(range(7))


def test_a_hubs_model_is_the_same_on_another_node_and_another_after_a_commit(
    model: Path, demo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two nodes with caches of their own. Catches a requeue that is refused because another node downloaded the model
    at another time, and answers of two commits in one result."""

    def on_node(node: str, commit: str) -> int:
        folder = tmp_path / node / "snapshots" / commit
        if not folder.exists():
            shutil.copytree(model, folder, copy_function=shutil.copy)
            os.utime(folder / "model.safetensors", (len(node), len(node)))
        monkeypatch.setattr(preparation, "model_on_host", lambda name: str(folder))
        words = arguments(Path("someone/tiny"), demo_folder, tmp_path / "out", "--max-samples", "3")
        return main(words)

    assert on_node("first", "a" * 40) == 0
    (tmp_path / "out/scores.json").unlink()
    assert on_node("the second", "a" * 40) == 0
    assert on_node("the second", "b" * 40) == 2
    assert "holds an evaluation with another weights" in capsys.readouterr().err


def test_weights_of_a_folder_that_were_written_again_are_others(
    model: Path, demo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder names no commit."""
    shutil.copytree(model, tmp_path / "model")
    words = arguments(tmp_path / "model", demo_folder, tmp_path / "out", "--max-samples", "3")
    assert main(words) == 0
    os.utime(tmp_path / "model/model.safetensors", (1, 1))
    assert main(words) == 2
    assert "holds an evaluation with another weights" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["evaluate", "audit"])
def test_a_second_one_into_the_same_folder_is_refused_until_the_first_is_dead(
    command: str, model: Path, demo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Real processes. Catches two that append to one part, and a lock that a killed one leaves behind."""
    output = tmp_path / "out"
    words = arguments(model, demo_folder, output)
    words = ["audit", *words[1:], "--tests", "barred", "--samples", "5"] if command == "audit" else words
    first = Fork("ilvr_ds.cli", *words, env=os.environ, out=tmp_path / "log")
    try:
        deadline = time.monotonic() + 200
        while read_owner(output / "lock.json") is None and time.monotonic() < deadline:
            time.sleep(0.01)
        first.send_signal(signal.SIGSTOP)
        before = sorted(path.name for path in output.iterdir())
        assert first.poll() is None and main(words) == 2
        said = [line for line in capsys.readouterr().err.splitlines() if "--output" in line]
        assert len(said) == 1 and f"{output} is being written by process {first.pid} on " in said[0]
        assert said[0].endswith("wait for its end, or give another --output")
        assert sorted(path.name for path in output.iterdir()) == before
    finally:
        first.kill()
        first.wait()
    assert main(words) == 0
    assert not (output / "lock.json").exists()
