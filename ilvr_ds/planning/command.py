"""`ilvr-ds plan`: from its arguments to a model, recipes, one report in detail or a line for each, and what fits."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from ilvr_ds.config import Recipe, load_recipe
from ilvr_ds.errors import UserError
from ilvr_ds.model.sizes import Geometry
from ilvr_ds.planning.chips import CHIPS, find_card, usable_gib
from ilvr_ds.planning.geometry import HUB_NAMES, KNOWN, RELEASES, geometry_of
from ilvr_ds.planning.report import default_chip, detail, least_needed, overview, what_fits
from ilvr_ds.planning.search import Candidate, Room, best_of_each_kind, changed_recipe, for_ranks, search
from ilvr_ds.planning.setup import SampleSize, Setup, Zero
from ilvr_ds.whole_files import write_whole

ReadConfig = Callable[[str], Any]
"""The transformers configuration in a folder, in a file or of a name on the hub"""
ReadDeepSpeed = Callable[[str, Path], dict[str, Any]]
"""The DeepSpeed settings at a path, which may be relative to the recipe's folder"""
SMALL_MODEL = 5e9
"""A model of fewer weights is planned from comt_3b, a larger one from comt_7b."""


@dataclass(frozen=True)
class PlanOptions:
    """The arguments of the command."""

    model: str | None
    """One of KNOWN, a folder, a config.json, a name on the hub; None: the recipe's"""
    gpus: int
    gpu_memory: float | None
    """GiB of each, or a card's nominal GB; None: the card's"""
    chip: str | None
    config: Path | None
    overrides: tuple[str, ...]
    sample: SampleSize
    card: str | None = None
    host_memory: float | None = None
    """GiB of the host for each rank; None: not looked at"""
    write: Path | None = None
    """File for the recipe that fits best"""


@dataclass(frozen=True)
class _Place:
    """The GPUs, in numbers and in words."""

    room: Room
    chip_name: str | None
    card: str | None
    nominal: float | None

    @staticmethod
    def of(options: PlanOptions) -> _Place:
        name, memory, chip = None, options.gpu_memory, options.chip
        if options.card is not None:
            name, card = find_card(options.card)
            memory, chip = memory or card.gib, chip or card.chip
        elif memory is None:
            raise UserError("plan: give --card NAME (RTX 4090, A100 80, ...), or --gpu-memory GIB")
        gib = usable_gib(memory)
        chip = chip or (default_chip(memory) if name is None else None)
        rates = None if chip is None else CHIPS[chip]
        return _Place(Room(gib, options.host_memory, rates, options.gpus), chip, name, memory)

    def __str__(self) -> str:
        notes = [self.card or self.chip_name or "a chip that is not said"]
        if self.card is None and self.nominal != self.room.gpu_gib:
            notes.append(f"a card of {self.nominal:g} GB")
        return f"{self.room.world} x {self.room.gpu_gib:g} GiB ({', '.join(notes)})"


@dataclass(frozen=True)
class _Base:
    """The recipe from which settings are searched."""

    name: str
    """As a command names it"""
    path: Path
    geometry: Geometry
    recipe: Recipe
    overrides: tuple[str, ...]
    needed: dict[str, Any] = field(default_factory=dict)
    """What must change before anything is searched: the model, the lanes"""


def plan(
    options: PlanOptions, recipes: Mapping[str, Path], read_config: ReadConfig, read_deepspeed: ReadDeepSpeed
) -> list[str]:
    """The lines to print. recipes: by name; those for the model get a line each. Raises UserError."""
    _check(options)
    place = _Place.of(options)
    room = place.room
    if options.config is not None:
        recipe = load_recipe(options.config, options.overrides)
        geometry = _geometry(options.model or _released(recipe.model.path) or recipe.model.path, read_config)
        if recipe.data.lanes % options.gpus:
            lanes = f"{recipe.data.lanes} lanes cannot be shared by {options.gpus} ranks"
            raise UserError(f"{options.config}: data.lanes: {lanes}; set it to a multiple of --gpus")
        setup = _setup(recipe, options.config, geometry, options, read_deepspeed)
        lines = detail(f"{options.config} on {place}", setup, room.gpu_gib, room.chip)
        needed = {"model.path": _path_of(options.model)} if options.model else {}
        base = _Base(str(options.config), options.config, geometry, recipe, options.overrides, needed)
    elif options.model is None:
        raise UserError(f"plan: give --model {', '.join(KNOWN)} or a folder, or a recipe by --config")
    else:
        base = _base_for(options.model, recipes, options.overrides, read_config)
        lines = [f"{options.model} on {place}; --config RECIPE shows one in detail"]
        lines += _overview(options, base, recipes, room, read_deepspeed)
    return [*lines, "", *_what_fits(options, base, room, read_deepspeed)]


def _check(options: PlanOptions) -> None:
    memory, host = options.gpu_memory, options.host_memory
    if options.gpus < 1 or (memory is not None and not memory > 0) or (host is not None and not host > 0):
        raise UserError("plan: --gpus must be 1 or more, --gpu-memory and --host-memory above 0 (GiB)")
    if options.chip is not None and options.chip not in CHIPS:
        raise UserError(f"plan: --chip {options.chip} is not known; valid: {', '.join(CHIPS)}")
    if min(options.sample.tokens, options.sample.labels) < 1 or options.sample.patches < 0:
        raise UserError("plan: --tokens and --labels must be 1 or more, --patches 0 or more")
    if options.write is not None and options.write.exists():
        raise UserError(f"plan: --write {options.write}: it exists; give another name")


def _overview(
    options: PlanOptions, base: _Base, recipes: Mapping[str, Path], room: Room, read_deepspeed: ReadDeepSpeed
) -> list[str]:
    """A line for each recipe of the model."""
    model = options.model
    setups = {
        path.name: _setup(recipe, path, base.geometry, options, read_deepspeed)
        for path in recipes.values()
        if (released := _released((recipe := load_recipe(path, options.overrides)).model.path))
        and (released == model or model not in KNOWN)
    }
    if not setups and f"comt_{model}" in recipes:
        raise UserError(f"plan: no recipe for {model} among {', '.join(recipes)}; give one by --config")
    return overview(setups, room.gpu_gib, room.chip) if setups else []


def _base_for(model: str, recipes: Mapping[str, Path], overrides: tuple[str, ...], read_config: ReadConfig) -> _Base:
    """The recipe to begin with, for a model alone."""
    geometry = _geometry(model, read_config)
    released = model if model in KNOWN else _released(model)
    name = f"comt_{released}"
    if name not in recipes:
        name = "comt_3b" if geometry.text.total < SMALL_MODEL else "comt_7b"
    recipe = load_recipe(recipes[name], overrides)
    is_other = name != f"comt_{released}" and not any(text.startswith("model.path=") for text in overrides)
    return _Base(name, recipes[name], geometry, recipe, overrides, {"model.path": _path_of(model)} if is_other else {})


def _what_fits(options: PlanOptions, base: _Base, room: Room, read_deepspeed: ReadDeepSpeed) -> list[str]:
    """The search, and the recipe that it writes."""
    zero_of = cache(lambda name: Zero.of(read_deepspeed(name, base.path.parent)))
    fixed = {text.partition("=")[0].strip() for text in base.overrides}
    needed = {**base.needed, **for_ranks(base.recipe, room.world, fixed)}
    recipe = changed_recipe(base.recipe, needed)
    found = search(recipe, fixed, base.geometry, options.sample, zero_of, room)
    best = best_of_each_kind(found, room)
    if not best:
        why = least_needed(found, room.host_gib)
        if options.write is not None:
            raise UserError(f"plan: --write: {why}")
        return [why]
    changes = {**needed, **best[0].changes}
    command = _command(base, changes, room.world)
    lines = what_fits(best, room.gpu_gib, room.chip, command)
    if options.write is not None:
        _write(options.write, recipe, best[0], f"Written by: {_self(options)}")
        lines.append(f"written to {options.write}")
    return lines


def _command(base: _Base, changes: Mapping[str, Any], world: int) -> str:
    """The command that trains with these changes."""
    start = "ilvr-ds train" if world == 1 else f"deepspeed --num_gpus {world} launch/train.sh"
    settings = [*base.overrides, *(f"{key}={value}" for key, value in changes.items())]
    return " ".join([start, "--config", shlex.quote(base.name), *(f"--set {shlex.quote(text)}" for text in settings)])


def _self(options: PlanOptions) -> str:
    """The command line of this plan, for the head of what it writes."""
    parts = ["ilvr-ds plan", f"--gpus {options.gpus}"]
    named = {"model": options.model, "config": options.config, "card": options.card, "gpu-memory": options.gpu_memory}
    parts += [f"--{name} {shlex.quote(str(value))}" for name, value in named.items() if value is not None]
    return " ".join([*parts, *(f"--set {shlex.quote(text)}" for text in options.overrides)])


def _write(path: Path, recipe: Recipe, best: Candidate, origin: str) -> None:
    """Write the recipe: what differs from the defaults. Raises UserError."""
    defaults = Recipe().flat()
    sections: dict[str, dict[str, Any]] = {}
    for key, value in changed_recipe(recipe, best.changes).flat().items():
        if value != defaults[key]:
            section, _, name = key.partition(".")
            sections.setdefault(section, {})[name] = value
    text = f"# {best.words}.\n# {origin}\n{yaml.safe_dump(sections, sort_keys=False, allow_unicode=True)}"
    try:
        write_whole(path, text)
    except OSError as error:
        raise UserError(f"plan: --write {path}: cannot be written ({error.strerror})") from error


def _setup(
    recipe: Recipe, path: Path, geometry: Geometry, options: PlanOptions, read_deepspeed: ReadDeepSpeed
) -> Setup:
    zero = Zero.of(read_deepspeed(recipe.deepspeed.config, path.parent))
    return Setup.of(recipe, zero, geometry, options.gpus, options.sample)


def _geometry(model: str, read_config: ReadConfig) -> Geometry:
    """The sizes of a released model, or those in a configuration. Raises UserError."""
    if model in KNOWN:
        return KNOWN[model]
    is_here = Path(model).exists()
    if not is_here and (released := _released(model)):
        return KNOWN[released]
    if not is_here and model.count("/") != 1:
        known = ", ".join(KNOWN)
        raise UserError(f"plan: --model '{model}' is none of {known}, nor a folder, a config.json or a name on the hub")
    try:
        return geometry_of(read_config(model))
    except UserError as error:
        raise UserError(f"plan: {str(error).replace('model.path', '--model')}") from error


def _path_of(model: str) -> str:
    """What `model.path` is for a model."""
    if model in KNOWN:
        return HUB_NAMES[model]
    return str(Path(model).parent) if Path(model).is_file() else model


def _released(path: str) -> str | None:
    """The name of the released model at a path."""
    return next((name for name, release in RELEASES.items() if release in path.lower()), None)
