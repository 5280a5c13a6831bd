"""The experiment on latents without its training: models of seeds, settings, and what is made of results."""

from __future__ import annotations

import json
import sys
from concurrent.futures import Future
from pathlib import Path
from threading import Event, Lock
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ilvr_ds.config import ModelConfig
from ilvr_ds.demo.material import write_demo_model
from ilvr_ds.model.student import load_student
from tests.bench import latents, latents_data
from tests.bench.gpu_slots import gpus, on_gpu, slots_of
from tests.bench.latents import Case, Shared, main, readings
from tests.bench.latents_data import model_folder, model_spec, write_models


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Options, with the models of seeds 0 to 2 written."""
    output = tmp_path_factory.mktemp(request.param)
    options = SimpleNamespace(output=output, size="tiny", family=request.param, seeds=[2, 1])
    write_models(options, "1")
    return options


def test_each_seed_begins_from_weights_of_its_own_behind_the_same_tower(written: SimpleNamespace) -> None:
    """Catches seeds that vary nothing but the order of samples, and a tower that stored features do not fit."""
    students = [
        load_student(ModelConfig(path=str(model_folder(written, "1", seed))), torch.float32, 0).state_dict()
        for seed in range(3)
    ]
    first = students[0]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        same = [name for name in first if torch.equal(students[one][name], students[other][name])]
        assert all(torch.equal(students[one][name], students[other][name]) for name in first if ".visual." in name)
        assert all(first[name].unique().numel() <= 2 for name in same if ".visual." not in name), "norms, biases"
        different = [name for name in first if name not in same]
        assert any("embed_tokens" in name for name in different) and any("down_proj" in name for name in different)
    for name, drawn in students[1].items():
        assert drawn.std() == pytest.approx(float(first[name].std()), rel=0.1, abs=1e-6), f"{name}: another scale"
    rms = [student["model.language_model.embed_tokens.weight"].square().mean().sqrt() for student in students]
    assert rms == pytest.approx([1.0] * 3, abs=1e-5)


def test_seed_0_is_the_model_that_it_was_and_all_share_tokenizer_and_settings(
    written: SimpleNamespace, tmp_path: Path
) -> None:
    write_demo_model(tmp_path / "model", model_spec("1"), "tiny", family=written.family)
    zero = model_folder(written, "1", 0)
    assert zero.name == "model-1"
    before, now = (load_file(folder / "model.safetensors") for folder in (tmp_path / "model", zero))
    assert before.keys() == now.keys() and all(torch.equal(before[name], now[name]) for name in before)
    files = {file.name for file in zero.iterdir()}
    for seed in (1, 2):
        folder = model_folder(written, "1", seed)
        assert {file.name for file in folder.iterdir()} == files
        differ = {name for name in files if (folder / name).read_bytes() != (zero / name).read_bytes()}
        assert differ == {"model.safetensors"}


def test_what_is_there_is_not_drawn_again_and_a_half_written_model_does_not_count(
    written: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a folder that holds the weights of seed 0 because its process was killed while it copied."""
    files = {seed: (model_folder(written, "1", seed) / "model.safetensors").stat().st_mtime_ns for seed in range(3)}
    write_models(written, "1")
    assert files == {s: (model_folder(written, "1", s) / "model.safetensors").stat().st_mtime_ns for s in range(3)}

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(latents_data, "redraw_language_model", killed)
    written.seeds = [3]
    with pytest.raises(KeyboardInterrupt):
        write_models(written, "1")
    assert not model_folder(written, "1", 3).exists()
    monkeypatch.undo()
    write_models(written, "1")
    assert (model_folder(written, "1", 3) / "model.safetensors").exists()


def test_a_case_trains_the_model_of_its_seed(tmp_path: Path) -> None:
    options = SimpleNamespace(
        output=tmp_path, size="tiny", family="qwen2_5_vl", seeds=[0, 1], workers=0, together=1, latents=2, lr=1.0,
        second_lr=1.0, steps=1, second_steps=1, batch=1, accum=1, precision="fp32", held_out=1, look_every=1,
        looks=False,
    )  # fmt: skip
    write_models(options, "1")
    paths = [Case(options, "changed", 1, seed).recipe("r", "1")["model"]["path"] for seed in (0, 1)]
    assert paths == [str(tmp_path / "model-1"), str(tmp_path / "model-1-s1")]


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was prepared and trained; nothing is."""
    done: list[Any] = []
    monkeypatch.setattr(latents, "prepare", lambda options, *_: done.append(options.samples))
    monkeypatch.setattr(Case, "run", lambda self, *_: done.append(self.name))
    return done


def command(monkeypatch: pytest.MonkeyPatch, output: Path, *words: str) -> int:
    """The exit code."""
    monkeypatch.setattr(sys, "argv", ["latents", "--output", str(output), "--arms", "text", *words])
    try:
        main()
    except SystemExit as end:
        return int(end.code) if isinstance(end.code, int) else 1
    return 0


RESULT = {"run": "text-n6-s0-1", "arm": "text", "signs": 6, "seed": 0, "stage": "1", "own": 0.25}


def test_results_of_other_settings_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], prepared: list[Any]
) -> None:
    """Catches a second command that trains nothing and prints the first one's table as its own."""
    words = ("--samples", "64", "--steps", "9", "--batch", "32")
    (tmp_path / "a").mkdir()
    assert command(monkeypatch, tmp_path / "a", *words, "--draw-only") == 0, "the data first, for any training"
    (tmp_path / "a/results.jsonl").write_text(json.dumps(RESULT) + "\n")
    assert command(monkeypatch, tmp_path / "a", *words) == 0
    assert json.loads((tmp_path / "a/settings.json").read_text())["steps"] == 9
    done = list(prepared)
    capsys.readouterr()
    for option, before, now in (
        ("--samples", "64", "65"), ("--steps", "9", "10"), ("--batch", "32", "64"), ("--lr", "0.0008", "0.001"),
        ("--held-out", "1024", "512"), ("--size", "medium", "mini"), ("--precision", "bf16", "fp32"),
    ):  # fmt: skip
        assert command(monkeypatch, tmp_path / "a", *words, option, now) == 2
        said = capsys.readouterr()
        assert said.out == "" and said.err == (
            f"error: {tmp_path / 'a/settings.json'}: what is there was made with {option} {before}, not {now}; give "
            "another --output\n"
        )
    assert prepared == done
    assert command(monkeypatch, tmp_path / "a", *words, "--seeds", "1", "--minutes", "5") == 0, "adds to the folder"
    assert command(monkeypatch, tmp_path / "a", "--table-only") == 0, "reads whatever is there"


def test_results_that_do_not_say_their_settings_are_refused_but_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], prepared: list[Any]
) -> None:
    (tmp_path / "results.jsonl").write_text(json.dumps(RESULT) + "\n")
    assert command(monkeypatch, tmp_path) == 2 and not prepared
    assert "settings.json: is missing beside results or data" in capsys.readouterr().err
    assert command(monkeypatch, tmp_path, "--table-only") == 0
    assert "| text | 6 | 1 | 1 | 25.0 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("tests", "words"),
    [
        ("donor,inside", "--tests donor,inside: replacement is missing, of which the table is made; add it"),
        ("replacement,donors", "--tests: 'donors' is unknown; did you mean 'donor'?; valid:"),
    ],
)
def test_tests_that_no_table_can_be_made_of_are_refused_before_anything_is_trained(
    tests: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    prepared: list[Any],
) -> None:  # fmt: skip
    """Catches a KeyError after an hour of training."""
    assert command(monkeypatch, tmp_path / "a", "--tests", tests) == 2
    assert words in capsys.readouterr().err.splitlines()[-1]
    assert not prepared and not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [("--batch", "48", "--batch 48: expected a multiple of 32"), ("--held-out", "255", "a micro-batch has 256")],
)
def test_sizes_that_no_arm_could_train_with_are_refused_before_anything_is_drawn(
    option: str, value: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], prepared: list[Any],
) -> None:  # fmt: skip
    assert command(monkeypatch, tmp_path / "a", option, value) == 2
    assert words in capsys.readouterr().err.splitlines()[-1] and not prepared


def test_an_arm_that_fails_says_why_and_the_others_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], prepared: list[Any]
) -> None:
    """Catches exit code 0 for a table in which arms are missing."""

    def train(case: Case, run: str, *_: Any) -> float:
        (tmp_path / f"{run}.log").write_text("many\nlines\nthe reason\n")
        raise latents.CommandError(tmp_path / f"{run}.log")

    monkeypatch.undo()
    monkeypatch.setattr(latents, "prepare", lambda *_: None)
    monkeypatch.setattr(Case, "_train", train)
    assert command(monkeypatch, tmp_path, "--draw-only") == 0
    (tmp_path / "results.jsonl").write_text(json.dumps(RESULT | {"run": "text-n6-s1-1", "seed": 1}) + "\n")
    assert command(monkeypatch, tmp_path) == 1
    said = capsys.readouterr()
    assert said.err.splitlines() == [f"text, N = 6, seed 0 failed: {tmp_path / 'text-n6-s0-1.log'}: the reason"]
    assert "| text | 6 | 1 | 1 | 25.0 |" in said.out


def test_readings_say_of_how_many_samples_they_are() -> None:
    audit = {"replacement": {"own": {"accuracy": 0.5, "samples": 8}, "zeros": {"accuracy": 0.25, "samples": 4}}}
    assert readings(audit) == {"own": 0.5, "zeros": 0.25, "samples": {"own": 8, "zeros": 4}}


def test_arms_are_spread_over_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches arms that all run on the first GPU, and a process that sees the others too."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-7")
    slots = slots_of(2, gpus())
    assert [slots.get() for _ in range(slots.qsize())] == ["4", "GPU-7", "4", "GPU-7"]
    assert on_gpu("GPU-7")["CUDA_VISIBLE_DEVICES"] == "GPU-7"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert gpus() == ["0", "1"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert gpus() == [""] and "CUDA_VISIBLE_DEVICES" not in on_gpu("")


@pytest.mark.parametrize("stage", ["drawing", "training"])
def test_an_arm_gives_its_place_back_when_something_fails(stage: str, tmp_path: Path) -> None:
    """Catches an experiment that waits for ever for a place, or for a run that was to be trained first."""
    options = SimpleNamespace(output=tmp_path, signs=[0], steps=1, look_steps=1)
    slots, drawn, looked = slots_of(1, [""]), Future[None](), {0: Event()}
    drawn.set_exception(OSError("disk full")) if stage == "drawing" else drawn.set_result(None)
    shared = Shared(tmp_path / "results.jsonl", Lock(), slots, {"operations": drawn}, looked)
    with pytest.raises(OSError if stage == "drawing" else AttributeError):  # these options lack what training needs
        Case(options, "look", 0, 0).run(shared)
    assert slots.qsize() == 1 and looked[0].is_set() == (stage == "training")
