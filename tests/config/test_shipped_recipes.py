"""The recipes of launch/recipes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from ilvr_ds import shipped
from ilvr_ds.config import load_recipe
from ilvr_ds.data.plan import SamplePlan
from ilvr_ds.engine.settings import read_deepspeed_json
from ilvr_ds.planning.chips import CARDS, usable_gib
from ilvr_ds.planning.geometry import HUB_NAMES, KNOWN
from ilvr_ds.planning.memory import GIB, predict_memory
from ilvr_ds.planning.search import Room
from ilvr_ds.planning.setup import SampleSize, Setup, Zero
from tests.ranks import ROOT

RECIPES = ROOT / "launch" / "recipes"


@pytest.mark.parametrize("name", ["comt_3b", "comt_7b", "authors_7b", "comt_qwen3vl_4b", "comt_qwen3vl_8b"])
def test_a_stage_1_recipe_becomes_one_of_stage_2_as_the_page_says(name: str) -> None:
    text = (ROOT / "docs/recipes.md").read_text().split("## Stage 2")[1].split("\n## ")[0]
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
        ("demo", (1, 2)), ("comt_3b", (1, 2)), ("comt_7b", (8,)), ("authors_7b", (8,)), ("vsp_7b", (8,)),
        ("comt_3b_24gb", (1,)), ("comt_3b_24gb-stage2", (1,)), ("comt_7b_48gb", (1,)), ("comt_7b_48gb-stage2", (1,)),
        ("comt_qwen3vl_4b", (1, 2)), ("comt_qwen3vl_8b", (8,)),
    ],
)  # fmt: skip
def test_recipes_run_on_the_devices_that_they_name(name: str, worlds: tuple[int, ...]) -> None:
    """Catches lanes that do not fit the number of GPUs in a recipe's first line."""
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    for world in worlds:
        batch = recipe.train.micro_batch_size * recipe.train.grad_accum_steps * world
        SamplePlan((10_000,), 0, recipe.data.lanes, batch).check_world(world)


@pytest.mark.parametrize("stage", ["", "-stage2"])
@pytest.mark.parametrize(
    ("name", "model", "cards"),
    [("comt_3b_24gb", "3b", ("RTX 3090", "RTX 4090", "L4")), ("comt_7b_48gb", "7b", ("RTX A6000", "L40S"))],
)
def test_recipes_for_one_card_fit_every_card_of_its_size(
    name: str, model: str, cards: tuple[str, ...], stage: str
) -> None:
    """Catches a recipe that names a card on which it runs out of memory: it must fit with a margin."""
    recipe = load_recipe(RECIPES / f"{name}{stage}.yaml")
    zero = Zero.of(read_deepspeed_json(recipe.deepspeed.config))
    memory = predict_memory(Setup.of(recipe, zero, KNOWN[model], 1, SampleSize()))
    for card in cards:
        assert Room(CARDS[card].gib, None, None, 1).holds(memory), card


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(
    ("name", "world", "for_stage_2"),
    [("comt_qwen3vl_4b", 2, []), ("comt_qwen3vl_8b", 8, ["train.micro_batch_tokens=6144"])],
)
def test_recipes_by_plan_fit_the_gpus_that_they_name(name: str, world: int, for_stage_2: list[str], stage: int) -> None:
    """Of 80 GB each, both stages as the page says; the model that is planned is the one that the recipe names."""
    assert all(change.replace("=", ": ") in (ROOT / "docs/recipes.md").read_text() for change in for_stage_2)
    changes = [f"train.stage={stage}", *(["deepspeed.config=zero2", *for_stage_2] if stage == 2 else [])]
    recipe = load_recipe(RECIPES / f"{name}.yaml", changes)
    model = name.removeprefix("comt_")
    assert recipe.model.path == HUB_NAMES[model]
    zero = Zero.of(read_deepspeed_json(recipe.deepspeed.config))
    memory = predict_memory(Setup.of(recipe, zero, KNOWN[model], world, SampleSize()))
    assert Room(usable_gib(80), None, None, world).holds(memory), memory.needed / GIB


@pytest.mark.parametrize("name", ["comt_3b_24gb", "comt_7b_48gb"])
def test_a_second_stage_goes_on_from_the_first(name: str) -> None:
    first, second = (load_recipe(RECIPES / f"{name}{stage}.yaml") for stage in ("", "-stage2"))
    assert second.model.init_from == f"{first.run.output_dir}/{first.run.name}" and second.train.has_free_latents
    changed = {key for key, value in second.flat().items() if first.flat()[key] != value}
    assert changed == {"run.name", "model.init_from", "train.stage"}, "adapters and data are the same"
