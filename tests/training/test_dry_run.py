"""`train --dry-run`, from its arguments to its lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from ilvr_ds.checkpoint.files import checksum_of, teacher_file
from ilvr_ds.cli import main
from ilvr_ds.config import load_recipe
from tests.recipes import RECIPE


def overrides(demo: Path, output: Path, **more: object) -> list[str]:
    values = {
        "run.output_dir": output,
        "data.shards": demo / "train",
        "data.eval_shards": demo / "held_out",
        "model.path": demo / "model",
        **{key.replace("__", "."): value for key, value in more.items()},
    }
    return [part for key, value in values.items() for part in ("--set", f"{key}={value}")]


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str], demo_folder: Path, tmp_path: Path) -> str:
    capsys.readouterr()
    assert main(["train", "--config", RECIPE, "--dry-run", "2", *overrides(demo_folder, tmp_path / "runs")]) == 0
    assert not (tmp_path / "runs").exists(), "nothing is written"
    return capsys.readouterr().out


def test_it_says_the_recipe_the_data_the_memory_and_ends(said: str, demo_folder: Path, tmp_path: Path) -> None:
    recipe, _, rest = said.partition("\n\n")
    sets = overrides(demo_folder, tmp_path / "runs")[1::2]
    assert yaml.safe_load(recipe.partition("\n")[2]) == load_recipe(RECIPE, sets).to_dict(), "defaults too"
    assert f"{demo_folder / 'train'}: 64 samples, the longest" in rest
    assert f"{demo_folder / 'held_out'}, held out: 16 samples" in rest
    assert "16 samples a step on 2 ranks, 4 steps an epoch, 0 samples left out of each epoch, 320 steps in all" in rest
    assert "a typical sample (mean of 64): " in rest and " patches\n" in rest
    for term in ("student's weights", "vision tower", "host memory (GiB)", "no GPU here; what fits on one says: "):
        assert term in rest


def test_a_mixture_leaves_nothing_out(demo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sets = f"[{demo_folder / 'train'}, {{path: {demo_folder / 'held_out'}, epochs: 0.6}}]"
    more = {"data__shards": sets, "data__eval_shards": "null"}
    assert main(["train", "--config", RECIPE, "--dry-run", "2", *overrides(demo_folder, tmp_path, **more)]) == 0
    rest = capsys.readouterr().out
    assert "4 steps an epoch, 9 samples left by each for the next, " in rest
    assert "mixture: train: " in rest and "mixture: held_out: " in rest


def test_mistakes_are_those_of_a_start(demo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", "--config", RECIPE, *overrides(demo_folder, tmp_path, data__lanes=3)]
    assert main([*arguments, "--dry-run"]) == 2
    assert "data.lanes" in capsys.readouterr().err
    assert main([*arguments, "--dry-run", "-1"]) == 2
    assert "--dry-run -1: must be a number of ranks" in capsys.readouterr().err


def test_what_does_nothing_is_said(demo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = overrides(demo_folder, tmp_path, optim__warmup_steps=321)
    assert main(["train", "--config", RECIPE, "--dry-run", "2", *settings]) == 0
    assert "optim.warmup_steps is 321, but the run has 320: optim.lr is never reached" in capsys.readouterr().err


def checkpoint(folder: Path, settings: list[str], samples: int) -> Path:
    """A checkpoint without files, of a step with so many samples."""
    state: dict[str, Any] = {
        "files": {teacher_file(0): [0, 0]},
        "loader": {"step": 3, "samples per step": samples},
        "world_size": 2,
        "zero_stage": 3,
        "layout": {},
        "recipe": load_recipe(RECIPE, settings[1::2]).to_dict(),
    }
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(json.dumps(state | {"checksum": checksum_of(state)}))
    return folder


def test_what_it_goes_on_from_is_looked_for_as_in_a_start(
    demo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a dry run that knows `auto` alone, and one that takes its own process for the ranks of the run."""
    settings = overrides(demo_folder, tmp_path, run__name="r")
    arguments = ["train", "--config", RECIPE, *settings, "--dry-run", "2", "--resume"]
    assert main([*arguments, "must"]) == 2
    assert "checkpoint.resume is must, but " in capsys.readouterr().err
    assert main([*arguments, str(tmp_path / "none")]) == 2
    assert "none' is not a checkpoint; valid: auto, must, never, or a folder" in capsys.readouterr().err
    assert main([*arguments, "auto"]) == 0
    assert "would go on" not in capsys.readouterr().out
    given = checkpoint(tmp_path / "other/step-00000003", settings, 16)
    own = checkpoint(tmp_path / "r/checkpoints/step-00000003", settings, 16)
    for resume, path in (("must", own), ("auto", own), (str(given), given)):
        assert main([*arguments, resume]) == 0
        assert f"it would go on from {path}\n" in capsys.readouterr().out
    assert main([*arguments, "never"]) == 2
    assert "checkpoint.resume is never, but " in capsys.readouterr().err
    (own / "state.json").write_text("{")
    assert main([*arguments, "auto"]) == 0
    assert f"it would look at {own}, which is damaged (JSONDecodeError)\n" in capsys.readouterr().out
    assert main([*arguments, str(checkpoint(tmp_path / "third/step-00000003", settings, 32))]) == 2
    assert "made with 32 samples a step, this job has 2 ranks x " in capsys.readouterr().err


def test_the_run_whose_weights_it_starts_from_is_looked_at(
    demo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a mistake in `model.init_from` that only a start on all ranks would find."""
    settings = overrides(demo_folder, tmp_path, run__name="r")
    arguments = ["train", "--config", RECIPE, *settings, "--dry-run", "2", "--set", f"model.init_from={tmp_path}/first"]
    assert main(arguments) == 2
    assert "first' is neither a checkpoint nor the folder of a run that has one" in capsys.readouterr().err
    path = checkpoint(tmp_path / "first/checkpoints/step-00000003", settings, 16)
    assert main([*arguments, "--set", "model.latent_size=3"]) == 2
    assert f"model.init_from: {path} was made with model.latent_size = 4, here it is 3" in capsys.readouterr().err
    assert main(arguments) == 0
    assert f"it would start from the weights of {path}\n" in capsys.readouterr().out
    own = checkpoint(tmp_path / "r/checkpoints/step-00000003", settings, 16)
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert f"it would go on from {own}\n" in said and "would start from" not in said


def test_stored_features_are_compared_as_far_as_no_tower_is_needed(
    demo_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("train", "held_out"):
        arguments = ["--shards", str(demo_folder / split), "--model", str(demo_folder / "model"), "--workers", "0"]
        assert main(["encode", *arguments, "--output", str(tmp_path / split)]) == 0
    stored = {"data__features": tmp_path / "train", "data__eval_features": tmp_path / "held_out"}
    changes: list[tuple[dict[str, object], str]] = [
        ({}, ""),
        ({"data__features": tmp_path / "held_out"}, "data.features: {}/held_out: made with data = "),
        ({"data__eval_features": tmp_path / "gone"}, "data.eval_features: {}/gone/features.json: cannot be read"),
        (
            {"data__max_image_pixels": 6272},
            "data.features: {}/train: made with images.max_pixels = 1003520 (",
        ),
    ]
    for change, words in changes:
        settings = overrides(demo_folder, tmp_path / "runs", **stored | change)
        capsys.readouterr()
        assert main(["train", "--config", RECIPE, "--dry-run", "2", *settings]) == (2 if words else 0)
        assert words.format(tmp_path) in capsys.readouterr().err
