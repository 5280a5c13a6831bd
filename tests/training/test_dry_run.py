"""`train --dry-run`, from its arguments to its lines."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from ilvr_ds.cli import main
from ilvr_ds.config import load_recipe
from tests.conftest import RECIPE


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
