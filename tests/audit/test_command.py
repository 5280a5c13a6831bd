from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ilvr_ds.audit.passes import ChangedPass, OwnPass
from ilvr_ds.audit.settings import selection_of
from ilvr_ds.cli import main
from ilvr_ds.config import SelectionConfig
from ilvr_ds.tracking.registry import register
from ilvr_ds.tracking.scores import log_scores
from tests.audit.planted import PlantedTower, planted_reasoner
from tests.evaluation.published import copies
from tests.forks import Fork
from tests.ranks import start_ranks

Audit = Callable[..., dict[str, Any]]


def numbers_of(folder: Path) -> dict[str, Any]:
    """audit.json without where it lies."""
    report: dict[str, Any] = json.loads((folder / "audit.json").read_text())
    return report


def test_a_killed_audit_goes_on_where_it_was(audit_of: Audit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in both passes, with a torn line: the result is that of one piece, and what is done is not done again."""
    tests = ("--tests", "replacement,donor")
    whole = audit_of("uses", *tests, output="whole")
    seen: list[tuple[type, range]] = []

    def dying_in(kind: type[OwnPass] | type[ChangedPass]) -> None:
        answer = kind.answer

        def dying(self: Any, batch: range) -> Any:
            seen.append((kind, batch))
            if sum(k is kind for k, _ in seen) == 2:
                raise KeyboardInterrupt
            return answer(self, batch)

        monkeypatch.setattr(kind, "answer", dying)

    dying_in(OwnPass)
    dying_in(ChangedPass)
    with pytest.raises(KeyboardInterrupt):
        audit_of("uses", *tests, output="killed")
    with pytest.raises(KeyboardInterrupt):
        audit_of("uses", *tests, output="killed")
    part = tmp_path / "killed/part-00000.jsonl"
    assert not (tmp_path / "killed/audit.json").exists() and part.read_text().count("\n") == 12
    part.write_bytes(part.read_bytes()[:-20])
    assert audit_of("uses", *tests, output="killed") == whole
    first, second = range(0, 12), range(12, 24)
    assert [batch for kind, batch in seen if kind is OwnPass] == [first, second, second]
    assert [batch for kind, batch in seen if kind is ChangedPass] == [first, second, first, second]
    assert audit_of("uses", *tests, output="killed") == whole
    assert len(seen) == 7, "a finished audit answers nothing again"


@pytest.mark.parametrize("kind", [OwnPass, ChangedPass])
def test_a_signal_in_either_pass_keeps_what_is_done(
    kind: type[OwnPass] | type[ChangedPass],
    audit_of: Audit,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = audit_of("uses", "--tests", "donor", output="whole")
    answer = kind.answer

    def hearing(self: Any, batch: range) -> Any:
        if batch.start:
            signal.raise_signal(signal.SIGINT)
            time.sleep(60)
        return answer(self, batch)

    monkeypatch.setattr(kind, "answer", hearing)
    assert audit_of("uses", "--tests", "donor", "--stop-exit-code", "85", output="stopped", code=85) == {}
    latents = "own latents" if kind is OwnPass else "other latents"
    assert f"{latents}: 12 of 24 samples are done and kept in {tmp_path / 'stopped'}" in capsys.readouterr().err
    monkeypatch.setattr(kind, "answer", answer)
    assert audit_of("uses", "--tests", "donor", output="stopped") == whole


def test_a_published_benchmark_is_audited_without_helper_images(
    planted_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own data set and rule, as `evaluate` has them; the page says which tests were left out."""
    from ilvr_ds.evaluation import preparation

    reasoner = planted_reasoner(planted_folder / "model", "uses")
    monkeypatch.setattr(preparation, "load_reasoner", lambda *_, **__: reasoner)
    command = ["audit", "--model", f"{planted_folder / 'model'}", "--benchmark", "vstar", "--max-new-tokens", "14"]
    data = ["--data", f"{copies.vstar(tmp_path / 'data')}", "--output", f"{tmp_path / 'out'}"]
    assert main([*command, *data]) == 0
    report = numbers_of(tmp_path / "out")
    assert (report["benchmark"], report["rule"], report["samples"]) == ("vstar", "vstar-lmms-eval-0.7.3", copies.COUNT)
    assert {"replacement", "donor", "barred", "inside"} <= report.keys() and "true" not in report["replacement"]
    assert report["left_out"] == dict.fromkeys(("true", "retrieval and targets"), "no sample has helper images")
    assert "retrieval and targets" in (tmp_path / "out/audit.md").read_text()


def test_no_benchmark_is_guessed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a default that misreads other data's answers in silence; said before anything is loaded."""
    for command in ("audit", "evaluate"):
        assert main([command, "--model", f"{tmp_path}", "--shards", f"{tmp_path}"]) == 2
        assert "--benchmark: is missing" in (said := capsys.readouterr().err) and "--benchmark option-letter" in said


@pytest.mark.drill
def test_two_ranks_say_what_one_says_also_after_a_kill(planted_folder: Path, tmp_path: Path) -> None:
    """A stock model: ranks are processes of their own."""

    def start(world: int, output: str) -> list[Fork]:
        words = stock(planted_folder, tmp_path / output)
        return start_ranks(world, tmp_path / f"{output}-logs", "ilvr_ds.cli", *words)

    [one] = start(1, "one")
    ranks, part = start(2, "two"), tmp_path / "two/own-00001.jsonl"
    deadline = time.monotonic() + 200
    while not (part.exists() and part.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.02)
    for rank in ranks:
        rank.kill()
        rank.wait()
    assert [rank.wait(200) for rank in (one, *start(2, "two"))] == [0, 0, 0]
    assert numbers_of(tmp_path / "two") == numbers_of(tmp_path / "one")
    assert (tmp_path / "two/audit.md").read_text() == (tmp_path / "one/audit.md").read_text()
    assert len(list((tmp_path / "two").glob("part-*.jsonl"))) == 2


def stock(folder: Path, output: Path, *more: str) -> list[str]:
    fixed = ["--batch-size", "8", "--max-new-tokens", "8", "--latent-size", "2", "--samples", "16"]
    return [
        "audit", "--model", f"{folder / 'model'}", "--shards", f"{folder / 'data'}", "--output", f"{output}",
        "--benchmark", "comt", *fixed, *more,
    ]  # fmt: skip


def test_the_prompts_of_a_batch_are_read_once_for_all_that_is_changed(
    audit_of: Audit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a prefill for each replacement: at 7B reading the images is most of the work."""
    read, tower = [], PlantedTower.__call__

    def noting(self: PlantedTower, images: Any) -> Any:
        read.append(len(images.cu_seqlens) - 1)
        return tower(self, images)

    monkeypatch.setattr(PlantedTower, "__call__", noting)
    audit_of("uses", "--tests", "replacement,donor,barred", data="plain")
    own, changed, likelihood, swap = [12] * 4
    assert read == [own, likelihood, changed, swap]


def test_scores_go_below_the_training_run_and_to_the_registered_version(
    planted_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    from ilvr_ds.evaluation import preparation

    store, folder = f"sqlite:///{tmp_path / 'mlflow.db'}", tmp_path / "model"
    run = log_scores(store, "e", "training", {}, {}, [])
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    origin = {"run": "r", "step": 1, "mlflow_run_id": run, "tracking_uri": store, "experiment": "e"}
    (folder / "training.json").write_text(json.dumps(origin | {"selection": {"top_p": 0.5}}))
    reference = register(folder, "name", None)
    reasoner = planted_reasoner(planted_folder / "model", "uses")
    monkeypatch.setattr(preparation, "load_reasoner", lambda *_, **__: reasoner)
    monkeypatch.setattr(preparation, "model_on_host", lambda name: name)
    command = ["audit", "--model", reference, "--shards", f"{planted_folder / 'data'}", "--tracking-uri", store]
    assert main([*command, "--benchmark", "comt", "--max-new-tokens", "14", "--tests", "replacement"]) == 0
    report = numbers_of(folder / "evaluation/audit-comt")
    assert report["selection"]["top_p"] == 0.5 and report["selection_from"] == "the model's training run"
    client = MlflowClient(tracking_uri=store)
    [child] = client.search_runs([client.get_experiment_by_name("e").experiment_id], "tags.kind = 'audit'")
    assert child.data.tags["mlflow.parentRunId"] == run
    assert child.data.metrics["replacement/zeros/difference"] == -0.75 and child.data.params["verdict"] == "used"
    files = [file.path for file in client.list_artifacts(child.info.run_id)]
    assert files == ["audit.json", "audit.md", "pictures"]
    tags = client.get_model_version("name", "1").tags
    assert tags["audit/replacement/own/accuracy"] == "1" and tags["audit/replacement/zeros/accuracy"] == "0.25"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--tests", "donors"), "--tests: 'donors' is unknown; did you mean 'donor'?"),
        (("--tests", ""), "--tests: '' is unknown"),
        (("--samples", "0"), "--samples 0: must be 1 or more"),
        (("--batch-size", "0"), "--batch-size must be 1 or more"),
        (("--benchmark", "comet"), "--benchmark: 'comet' is unknown; did you mean 'comt'?"),
        (("--set", "model.path=x"), "--set model.path=x: expected a key of selection"),
        (("--set", "selection.pool=chnged"), "selection.pool is 'chnged'; valid: all, changed, region"),
        (("--set", "selection.pol=all"), "unknown key 'selection.pol'; did you mean 'selection.pool'?"),
        (("--model", "/nowhere"), "--model: "),
        (("--tracking-uri", "bogus://x"), "--tracking-uri bogus://x: "),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(
    planted_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], words: str
) -> None:
    capsys.readouterr()
    assert main(stock(planted_folder, tmp_path / "out", *more)) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert words in line
    assert not (tmp_path / "out").exists()


def test_other_tests_in_the_same_folder_are_refused(audit_of: Audit, capsys: pytest.CaptureFixture[str]) -> None:
    audit_of("uses", "--tests", "barred")
    with pytest.raises(AssertionError):
        audit_of("uses", "--tests", "donor")
    assert "holds an evaluation with another tests; give another --output" in capsys.readouterr().err


def test_selection_is_that_of_the_run_unless_told_otherwise(tmp_path: Path) -> None:
    assert selection_of(str(tmp_path), 8, ()) == (
        SelectionConfig(), "defaults, for the model does not say how it was trained"
    )  # fmt: skip
    noted = {"pool": "changed", "by": "change", "top_p": 1.0, "of_a_later_version": 3}
    (tmp_path / "training.json").write_text(json.dumps({"selection": noted}))
    found, source = selection_of(str(tmp_path), 8, ("selection.by=query",))
    assert found == SelectionConfig(pool="changed", by="query", top_p=1.0)
    assert source == "the model's training run; selection.by=query"
