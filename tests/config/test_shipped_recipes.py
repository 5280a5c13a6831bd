"""The recipes of launch/recipes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from ilvr_ds import shipped
from ilvr_ds.config import load_recipe
from ilvr_ds.data.plan import SamplePlan
from tests.ranks import ROOT

RECIPES = ROOT / "launch" / "recipes"


@pytest.mark.parametrize("name", ["comt_3b", "comt_7b", "authors_7b"])
def test_a_stage_1_recipe_becomes_one_of_stage_2_as_the_readme_says(name: str) -> None:
    text = (ROOT / "README.md").read_text().split("## Stage 2")[1].split("\n## ")[0]
    ours, published = (yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL))
    for settings in (ours, ours | published):
        changes = [f"{section}.{key}={value}" for section, keys in settings.items() for key, value in keys.items()]
        recipe = load_recipe(RECIPES / f"{name}.yaml", changes)
        assert recipe.train.has_free_latents
        assert recipe.has_teacher == recipe.packs == (settings is ours)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_loads_and_names_a_deepspeed_file(path: Path) -> None:
    named = shipped.deepspeed_files()[load_recipe(path).deepspeed.config]
    assert named.parent.name == "ds_configs" and named.is_file()


@pytest.mark.parametrize(
    ("name", "worlds"),
    [
        ("demo", (1, 2)),
        ("comt_3b", (1, 2)),
        ("comt_7b", (8,)),
        ("comt_qwen3vl_4b", (1, 2)),
        ("comt_qwen3vl_8b", (8,)),
        ("authors_7b", (8,)),
        ("vsp_7b", (8,)),
    ],
)
def test_recipes_run_on_the_devices_that_they_name(name: str, worlds: tuple[int, ...]) -> None:
    """Catches lanes that do not fit the number of GPUs in a recipe's first line."""
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    for world in worlds:
        batch = recipe.train.micro_batch_size * recipe.train.grad_accum_steps * world
        SamplePlan((10_000,), 0, recipe.data.lanes, batch).check_world(world)
