"""`ilvr-ds plan` from its arguments to its lines and exit codes."""

from __future__ import annotations

from pathlib import Path

import pytest

from ilvr_ds.cli import main
from tests.golden_set import golden_set
from tests.ranks import ROOT

SIZE = ["--gpus", "8", "--gpu-memory", "80"]


@pytest.fixture(autouse=True)
def at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_recipes_of_the_model_are_listed_with_whether_they_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", "7b", *SIZE]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if ".yaml" in line]
    assert [line.split()[0] for line in lines] == ["authors_7b.yaml", "comt_7b.yaml", "vsp_7b.yaml"]
    assert all("  fits: " in line for line in lines), "as their comments say: 8 GPUs of 80 GB"
    assert main(["plan", "--model", "7b", "--gpus", "1", "--gpu-memory", "80"]) == 0
    assert capsys.readouterr().out.count("does not fit") == 3


def test_a_recipe_in_detail(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--config", "launch/recipes/comt_3b.yaml", *SIZE, "--set", "train.micro_batch_size=2"]) == 0
    text = capsys.readouterr().out
    assert "launch/recipes/comt_3b.yaml on 8 x 79.2 GiB (H100, a card of 80 GB)" in text and "\nfits: " in text
    for term in ("student's weights", "vision tower", "teacher's averages", "momentum update", "optim.name=adamw_8bit"):
        assert term in text


def test_a_step_has_the_recipes_samples_however_micro_batches_are_filled(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a step of three times six samples where the recipe has sixteen."""
    assert main(["plan", "--config", "launch/recipes/comt_3b.yaml", "--gpus", "2", "--gpu-memory", "80"]) == 0
    text = capsys.readouterr().out
    assert "a step of 32 samples" in text and "\ntrain.micro_batch_tokens=4096 " in text
    assert "train.micro_batch_size=1" not in text


def test_a_folder_is_read_for_its_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(golden_set().folder)
    assert main(["plan", "--model", folder, "--config", "launch/recipes/demo.yaml", *SIZE]) == 0
    assert "fits: 76" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "8b", *SIZE], "plan: --model '8b' is neither 3b nor 7b nor qwen3-4b nor qwen3-8b nor a folder"),
        ([*SIZE], "plan: give --model"),
        (["--model", "7b", "--gpus", "0", "--gpu-memory", "80"], "plan: --gpus must be 1 or more"),
        (["--model", "7b", "--gpus", "1", "--gpu-memory", "nan"], "plan: --gpus must be 1 or more"),
        (["--model", "7b", *SIZE, "--chip", "H300"], "plan: --chip H300 is not known; valid: H100 PCIe"),
        (["--model", "7b", *SIZE, "--tokens", "0"], "plan: --tokens and --labels must be 1 or more"),
        (["--config", "none.yaml", *SIZE], "none.yaml: cannot read the recipe"),
        (
            ["--config", "launch/recipes/comt_3b.yaml", "--gpus", "3", "--gpu-memory", "80"],
            "launch/recipes/comt_3b.yaml: data.lanes: 16 lanes cannot be shared by 3 ranks",
        ),
        (["--model", "7b", *SIZE, "--set", "optim.nme=x"], "--set optim.nme=x: unknown key"),
        (
            ["--config", "launch/recipes/comt_3b.yaml", *SIZE, "--set", "model.lora_targets=[qproj]"],
            "launch/recipes/comt_3b.yaml: model.lora_targets: no linear layer 'qproj'; did you mean 'q_proj'?",
        ),
    ],
)
def test_mistakes_are_one_line_and_exit_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"ilvr-ds: error: {message}")


def test_recipes_are_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "--model", "7b", *SIZE]) == 0
    assert capsys.readouterr().out.count("_7b.yaml") == 3
    assert main(["plan", "--config", "comt_7b", *SIZE]) == 0
    assert "comt_7b.yaml on 8 x 79.2 GiB" in capsys.readouterr().out


def test_without_recipes_there_is_nothing_to_say(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", "7b", *SIZE, "--set", "model.path=elsewhere"]) == 2
    assert "no recipe for 7b among authors_7b, comt_3b, " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("gpu_memory", "words"),
    [
        ("80", "79.2 GiB (H100, a card of 80 GB)"),
        ("79", "79 GiB (H100)"),
        ("141", "139.8 GiB (H200, a card of 141 GB)"),
    ],
)
def test_a_size_may_be_what_a_card_is_named_by(gpu_memory: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a plan with 0.8 GiB that no card of 80 GB has."""
    assert main(["plan", "--model", "7b", "--gpus", "8", "--gpu-memory", gpu_memory]) == 0
    assert f"7b on 8 x {words}; " in capsys.readouterr().out
