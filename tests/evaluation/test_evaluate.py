from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ilvr_ds.cli import main
from ilvr_ds.evaluation import evaluate as module
from ilvr_ds.evaluation.preparation import default_output
from ilvr_ds.generation.settings import GenerationSettings
from ilvr_ds.model.vision import VisionTower
from tests.evaluation.evaluating import arguments, lines_of, scores_of


def test_files_hold_what_is_promised(model: Path, demo_folder: Path, tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    assert main(arguments(model, demo_folder, tmp_path / "out", "--compare-pixels", "1", "--tracking-uri", uri)) == 0
    lines = lines_of(tmp_path / "out")
    assert [line["number"] for line in lines] == list(range(16))
    predictions = [json.loads(text) for text in (tmp_path / "out/predictions.jsonl").read_text().splitlines()]
    assert predictions == [{"id": line["id"], "response": line["response"]} for line in lines]
    scores = json.loads((tmp_path / "out/scores.json").read_text())
    for rule in ("comt-official", "ilvr-2026-08"):
        types = scores["rules"][rule]["types"]
        assert sorted(types) == ["creation", "deletion", "selection", "update"]
        assert all(part["chance"] == 0.25 and part["samples"] == 4 for part in types.values())
        right = sum(line["verdicts"][rule] for line in lines)
        assert scores["rules"][rule]["accuracy"] == right / 16
    assert scores["latents"]["segments_per_answer"] > 0, "latents must run"
    assert scores["cost"]["answers"] == 1 and scores["cost"]["pixels"]["tokens"] > 0
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    [run] = client.search_runs([client.get_experiment_by_name("evaluation").experiment_id])
    assert run.data.metrics["comt-official/macro_mean"] == scores["rules"]["comt-official"]["macro_mean"]
    files = [file.path for file in client.list_artifacts(run.info.run_id)]
    assert files == ["examples.json", "pictures", "table_images"]


@pytest.fixture(scope="module")
def base_scores(model: Path, demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Evaluations of 2 samples: of the base without latent tokens, and of the model in each mode."""
    folder = tmp_path_factory.mktemp("scores")
    few = ("--max-samples", "2", "--max-new-tokens", "5")
    assert main(arguments(demo_folder / "model", demo_folder, folder / "base", *few)) == 0
    for mode in ("latent", "cot", "direct"):
        assert main(arguments(model, demo_folder, folder / mode, *few, "--mode", mode)) == 0
    return {name: folder / name for name in ("base", "latent", "cot", "direct")}


def settings_of(folder: Path) -> dict[str, Any]:
    settings: dict[str, Any] = scores_of(folder)["settings"]
    return settings


def test_a_model_without_latent_tokens_answers_in_words(base_scores: dict[str, Path]) -> None:
    """The base before training. Catches segments that it cannot have, and a question that asks for nothing."""
    settings = settings_of(base_scores["base"])
    assert (settings["mode"], settings["latent_size"]) == ("cot", 0)
    assert settings["instruction"].startswith("Think step by step") and "(LETTER)" in settings["instruction"]
    lines = lines_of(base_scores["base"])
    assert len(lines) == 2 and all(line["steps"] == [] and line["new_tokens"] > 0 for line in lines)


def test_only_the_mode_latent_opens_segments(base_scores: dict[str, Path]) -> None:
    segments = {
        mode: sum(len(line["steps"]) for line in lines_of(base_scores[mode])) for mode in ("latent", "cot", "direct")
    }
    assert segments["latent"] > 0 and segments["cot"] == segments["direct"] == 0
    assert not {"mode", "instruction"} & settings_of(base_scores["latent"]).keys(), "earlier results can go on"
    asked = [settings_of(base_scores[mode])["instruction"] for mode in ("cot", "direct")]
    assert asked[0] != asked[1]
    read = {mode: scores_of(base_scores[mode])["speed"]["prefill_tokens"] for mode in ("latent", "cot", "direct")}
    assert read["latent"] < read["direct"] != read["cot"] > read["latent"], "what is asked for stands in the prompt"


def test_base_and_trained_model_stand_in_one_table(
    base_scores: dict[str, Path], model: Path, demo_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["compare", str(base_scores["latent"]), str(base_scores["base"])]) == 0
    header, first, second, paired, judged = capsys.readouterr().out.splitlines()
    assert "comt: comt-official, n 2" in header
    assert first.startswith(f"{demo_folder / 'model'} (cot)") and second.startswith(str(model))
    assert "[" in second and "[" not in first and "(cot) on the same samples" in paired
    assert judged == "judged by comt-official version 2 (CoMT evaluate.py 0109566)"


def test_what_was_answered_is_judged_by_todays_rules(
    model: Path, demo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Started again after the rules have changed, it judges anew and answers nothing. Catches verdicts of earlier
    rules under today's version."""
    command = arguments(model, demo_folder, tmp_path / "out", "--max-samples", "4", "--max-new-tokens", "2")
    assert main(command) == 0
    part = tmp_path / "out/part-00000.jsonl"
    lines = [json.loads(text) for text in part.read_text().splitlines()]
    for line in lines:
        letter = line["answer"] if line["number"] else "Z"
        line |= {"response": f"({letter})", "verdicts": {"comt-official": False, "ilvr-2026-08": False}}
    part.write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(module._Run, "answer", None)
    assert main(command) == 0
    judged = json.loads((tmp_path / "out/scores.json").read_text())["rules"]["comt-official"]
    assert (judged["version"], judged["accuracy"]) == ("2 (CoMT evaluate.py 0109566)", 0.75)


def test_results_of_another_mode_stand_beside(model: Path, demo_folder: Path) -> None:
    few = ["--shards", f"{demo_folder / 'held_out'}", "--benchmark", "comt", "--max-new-tokens", "2"]
    assert main(["evaluate", "--model", f"{model}", *few, "--max-samples", "2", "--mode", "direct"]) == 0
    assert [folder.name for folder in (model / "evaluation").iterdir()] == ["comt-direct"]


def test_the_prompts_of_a_batch_are_read_once_for_all_ablations(
    model: Path, demo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a prefill for each condition: at 7B reading the images is most of the work."""
    read, tower = [], VisionTower.forward

    def noting(self: VisionTower, images: Any) -> Any:
        read.append(len(images.cu_seqlens) - 1)
        return tower(self, images)

    monkeypatch.setattr(VisionTower, "forward", noting)
    few = ("--ablate-latents", "--max-samples", "2", "--max-new-tokens", "3")
    assert main(arguments(model, demo_folder, tmp_path / "out", *few)) == 0
    assert read == [2, 2], "own latents, and all others"


def test_latents_are_not_ablated_where_there_are_none(
    model: Path, demo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = arguments(model, demo_folder, tmp_path / "out", "--ablate-latents", "--mode", "direct")
    assert main(command) == 2
    assert "--ablate-latents: answers in mode direct have no latents to replace" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_results_of_a_models_name_do_not_take_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a folder ORG/NAME, which from then on is what `--model ORG/NAME` means."""
    monkeypatch.chdir(tmp_path)
    assert default_output("org/name", "comt") == Path("evaluation/org--name/comt")
    (tmp_path / "org/name").mkdir(parents=True)
    assert default_output("org/name", "comt") == Path("org/name/evaluation/comt")


def test_a_sample_without_an_answer_is_left_out_and_counted(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It does not stop the evaluation, gets no verdict, and keeps the others' numbers in the data set."""
    records = [{"text_input": f"How many? {n}", "sequence_plan": [], "answer": "" if n == 1 else "B"} for n in range(5)]
    (tmp_path / "set.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert main(["pack", "--input", f"{tmp_path}/set.jsonl", "--output", f"{tmp_path}/held_out"]) == 0
    command = [*arguments(model, tmp_path, tmp_path / "out", "--max-new-tokens", "2"), "--batch-size", "2"]
    for _ in range(2):  # the second finds all done
        assert main(command) == 0
        said = "left out: 1 sample; the first: sample set-2 cannot be scored for comt: it has no answer"
        assert said in capsys.readouterr().out.splitlines()
        assert [line["number"] for line in lines_of(tmp_path / "out")] == [0, 2, 3, 4]
        scores = json.loads((tmp_path / "out/scores.json").read_text())
        assert (scores["left_out"], scores["settings"]["samples"]) == (1, 4)
        assert scores["rules"]["comt-official"]["types"][""]["samples"] == 4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"--benchmark": "comet"}, "--benchmark: 'comet' is unknown; did you mean 'comt'?"),
        ({"--benchmark": "vsp"}, "cannot be scored for vsp: it has no map_desc"),
        ({"--model": "{demo}/model", "--mode": "latent"}, "lacks <|latent_pad|>, <|latent_start|>, <|latent_end|>"),
        ({"--model": "{demo}/model", "--latent-size": "3"}, "--latent-size: the model at"),
        ({"--mode": "cots"}, "--mode: 'cots' is unknown; did you mean 'cot'?"),
        ({"--model": "{tmp}"}, "--model: no model at"),
        ({"--shards": "{tmp}/bare"}, "cannot be scored for comt: it has no answer"),
        ({"--shards": "{tmp}/none"}, "expected a folder that `ilvr-ds pack` wrote"),
        ({"--top-p": "0"}, "--top-p above 0"),
        ({"--seed": "-1"}, "--seed -1: must be 0 or more"),
        ({"--stop": ""}, "--stop: is empty"),
        ({"--latent-size": "0"}, "--latent-size 0: must be 1 or more"),
        ({"--model": "{tmp}/run"}, "is a run; make a model of it: ilvr-ds export"),
        ({"--max-image-pixels": "1"}, "--max-image-pixels 1: must be from 3136 to"),
        ({"--batch-size": "0"}, "--batch-size must be 1 or more"),
        ({"--compare-pixels": "-1"}, "--compare-pixels -1: must be 0 or more"),
        ({"--max-samples": "-1"}, "--max-samples -1: must be 1 or more"),
        ({"--max-samples": "0"}, "--max-samples 0: must be 1 or more"),
        ({"--tracking-uri": "bogus://x"}, "--tracking-uri bogus://x: "),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(
    model: Path, demo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    changes: dict[str, str], words: str,
) -> None:  # fmt: skip
    if "bare" in str(changes):
        (tmp_path / "bare.jsonl").write_text('{"text_input": "Why?", "sequence_plan": []}\n')
        assert main(["pack", "--input", f"{tmp_path}/bare.jsonl", "--output", f"{tmp_path}/bare"]) == 0
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    command = arguments(model, demo_folder, tmp_path / "out")
    for name, value in changes.items():
        command += [name, value.format(demo=demo_folder, tmp=tmp_path)]
    capsys.readouterr()
    assert main(command) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert words in line
    assert not (tmp_path / "out").exists()


def test_another_evaluation_in_the_same_folder_is_refused(
    model: Path, demo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(model, demo_folder, tmp_path / "out", "--max-samples", "4")) == 0
    assert main(arguments(model, demo_folder, tmp_path / "out")) == 2
    assert "holds an evaluation with another samples; give another --output" in capsys.readouterr().err


def test_generation_settings_are_part_of_the_identity() -> None:
    assert json.dumps(GenerationSettings().__dict__)
