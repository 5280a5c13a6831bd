"""`ilvr-ds plan`: from its arguments to a model, recipes, and one report in detail or a line for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ilvr_ds.config import Recipe, load_recipe
from ilvr_ds.errors import UserError
from ilvr_ds.planning.chips import CHIPS, usable_gib
from ilvr_ds.planning.geometry import KNOWN, RELEASES, Geometry
from ilvr_ds.planning.report import default_chip, detail, overview
from ilvr_ds.planning.setup import SampleSize, Setup, Zero

ReadConfig = Callable[[str], Any]
"""The transformers configuration in a folder"""
ReadDeepSpeed = Callable[[str, Path], dict[str, Any]]
"""The DeepSpeed settings at a path, which may be relative to the recipe's folder"""


@dataclass(frozen=True)
class PlanOptions:
    """The arguments of the command."""

    model: str | None
    """One of KNOWN, or a folder; None: the recipe's"""
    gpus: int
    gpu_memory: float
    """GiB of each, or a card's nominal GB"""
    chip: str | None
    config: Path | None
    overrides: tuple[str, ...]
    sample: SampleSize


def plan(
    options: PlanOptions, recipes: Mapping[str, Path], read_config: ReadConfig, read_deepspeed: ReadDeepSpeed
) -> list[str]:
    """The lines to print. recipes: by name; those for the model get a line each. Raises UserError."""
    if options.gpus < 1 or not options.gpu_memory > 0:
        raise UserError("plan: --gpus must be 1 or more, --gpu-memory above 0 (GiB)")
    if options.chip is not None and options.chip not in CHIPS:
        raise UserError(f"plan: --chip {options.chip} is not known; valid: {', '.join(CHIPS)}")
    if min(options.sample.tokens, options.sample.labels) < 1 or options.sample.patches < 0:
        raise UserError("plan: --tokens and --labels must be 1 or more, --patches 0 or more")
    chip = options.chip or default_chip(options.gpu_memory)
    room = usable_gib(options.gpu_memory)
    named = f", a card of {options.gpu_memory:g} GB" if room != options.gpu_memory else ""
    gpus = f"{options.gpus} x {room:g} GiB ({chip}{named})"
    if options.config is not None:
        recipe = load_recipe(options.config, options.overrides)
        geometry = _geometry(options.model or _released(recipe) or recipe.model.path, read_config)
        if recipe.data.lanes % options.gpus:
            lanes = f"{recipe.data.lanes} lanes cannot be shared by {options.gpus} ranks"
            raise UserError(f"{options.config}: data.lanes: {lanes}; set it to a multiple of --gpus")
        setup = _setup(recipe, options.config, geometry, options, read_deepspeed)
        return detail(f"{options.config} on {gpus}", setup, room, chip)
    if options.model is None:
        raise UserError("plan: give --model 7b, 3b or a folder, or a recipe by --config")
    geometry = _geometry(options.model, read_config)
    setups = {
        path.name: _setup(recipe, path, geometry, options, read_deepspeed)
        for path in recipes.values()
        if (released := _released(recipe := load_recipe(path, options.overrides)))
        and (released == options.model or options.model not in KNOWN)
    }
    if not setups:
        raise UserError(f"plan: no recipe for {options.model} among {', '.join(recipes)}; give one by --config")
    return [f"{options.model} on {gpus}; --config RECIPE shows one in detail", *overview(setups, room, chip)]


def _setup(
    recipe: Recipe, path: Path, geometry: Geometry, options: PlanOptions, read_deepspeed: ReadDeepSpeed
) -> Setup:
    zero = Zero.of(read_deepspeed(recipe.deepspeed.config, path.parent))
    return Setup.of(recipe, zero, geometry, options.gpus, options.sample)


def _geometry(model: str, read_config: ReadConfig) -> Geometry:
    if model in KNOWN:
        return KNOWN[model]
    if not Path(model).is_dir():
        raise UserError(f"plan: --model '{model}' is neither {' nor '.join(KNOWN)} nor a folder")
    return Geometry.of(read_config(model))


def _released(recipe: Recipe) -> str | None:
    """The name of the released model that the recipe trains."""
    path = recipe.model.path.lower()
    return next((name for name, release in RELEASES.items() if release in path), None)
