"""`train --dry-run`: what a run would be. Nothing is written, no weights are read, ranks do not meet."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import yaml

from ilvr_ds import dist
from ilvr_ds.checkpoint.compatible import check_fits
from ilvr_ds.checkpoint.find import next_checkpoint
from ilvr_ds.checkpoint.initial import next_initial
from ilvr_ds.config import Recipe
from ilvr_ds.data.mixture import Mixture, MixtureReader
from ilvr_ds.data.reader import DamagedSampleError
from ilvr_ds.data.sample import SampleError
from ilvr_ds.data.template import IGNORE, EncodedSample
from ilvr_ds.errors import counted
from ilvr_ds.model.encoding import Encoding, build_encoding
from ilvr_ds.planning.chips import find_chip
from ilvr_ds.planning.geometry import geometry_of
from ilvr_ds.planning.memory import GIB
from ilvr_ds.planning.report import detail
from ilvr_ds.planning.setup import SampleSize, Setup, Zero
from ilvr_ds.training.assembly.data import check_features
from ilvr_ds.training.assembly.inputs import Inputs, say_what_does_nothing
from ilvr_ds.training.shares import share_lines

LOOKED_AT = 64
"""Samples, evenly from all of the data set, that say what a typical one is."""


def dry_run(recipe: Recipe, recipe_path: Path, world: int) -> list[str]:
    """The recipe with its defaults, counts of the data, memory and time of a run on `world` ranks, as lines.

    Raises UserError for the mistakes in settings and data that would end a start, and warns of what has no effect.
    """
    inputs = Inputs.read(recipe, recipe_path, world)
    encoding = build_encoding(recipe)
    if recipe.data.has_features:
        check_features(recipe, recipe_path, inputs, encoding)
    total = recipe.train.max_steps or recipe.train.epochs * inputs.plan.steps_per_epoch
    say_what_does_nothing(recipe, inputs, total)
    lines = ["the recipe, with its defaults:", *yaml.safe_dump(recipe.to_dict(), sort_keys=False).splitlines()]
    lines += ["", *_start(recipe, inputs, world, total)]
    sample, typical = _typical(inputs.training, encoding)
    lines.append(typical)
    return [*lines, "", *_plan(recipe, recipe_path, inputs, encoding, sample, world)]


def _start(recipe: Recipe, inputs: Inputs, world: int, total: int) -> Iterator[str]:
    """The data, the length of the run, and what it would go on from."""
    plan = inputs.plan
    left = "by each for the next" if inputs.training.named else "out of each epoch"
    epoch = f"{counted(plan.steps_per_epoch, 'step')} an epoch"
    yield f"{inputs.training.location}: {_contents(inputs.training)}"
    if inputs.held_out is not None:
        yield f"{inputs.held_out.location}, held out: {_contents(inputs.held_out)}"
    yield (
        f"{plan.global_batch} samples a step on {counted(world, 'rank')}, {epoch}, "
        f"{plan.remainder} samples left {left}, {counted(total, 'step')} in all"
    )
    yield from (f"mixture: {line}" for line in share_lines(plan, inputs.training.named, total))
    yield from _goes_on_from(recipe, world)


def _goes_on_from(recipe: Recipe, world: int) -> Iterator[str]:
    """The checkpoint that a start would look at first, of this run or of `model.init_from`, if there is one. Raises
    UserError where it does not fit."""
    if (path := next_checkpoint(recipe)) is None:
        if initial := next_initial(recipe):
            yield f"it would start from the weights of {initial}"
        return
    try:
        check_fits(path, recipe, world)
    except (OSError, ValueError, LookupError, AttributeError) as error:  # a start looks at every file
        yield f"it would look at {path}, which is damaged ({type(error).__name__})"
    else:
        yield f"it would go on from {path}"


def _contents(data: Mixture) -> str:
    groups = [f"{name or '(none)'} {count}" for name, count in sorted(data.groups.items())]
    longest = f", the longest {data.longest_tokens} tokens" if data.longest_tokens else ""
    return f"{len(data)} samples{longest}; {', '.join(groups)}"


def _typical(data: Mixture, encoding: Encoding) -> tuple[SampleSize, str]:
    """The mean of some samples, and in words."""
    reader = MixtureReader(data)
    numbers = np.unique(np.linspace(0, len(data) - 1, min(LOOKED_AT, len(data))).astype(int))
    encoded: list[EncodedSample] = []
    for number in numbers.tolist():
        try:
            encoded.append(encoding.encoder(reader.read(number)))
        except (SampleError, DamagedSampleError):  # training replaces and counts it
            continue
    if not encoded:
        return SampleSize(), f"none of {len(numbers)} samples that were looked at can be used"
    sums = [(len(s.input_ids), int((s.labels != IGNORE).sum()), sum(h * w for h, w in s.grids)) for s in encoded]
    tokens, labels, patches = (round(float(mean)) for mean in np.mean(sums, axis=0))
    bad = f", {len(numbers) - len(encoded)} more cannot be used" if len(encoded) < len(numbers) else ""
    words = f"a typical sample (mean of {len(encoded)}{bad}): {tokens} tokens, {labels} supervised, {patches} patches"
    return SampleSize(tokens, max(1, labels), patches), words


def _plan(
    recipe: Recipe, recipe_path: Path, inputs: Inputs, encoding: Encoding, sample: SampleSize, world: int
) -> list[str]:
    """Memory and least time, on the GPU of this process if it has one."""
    setup = Setup.of(recipe, Zero.of(inputs.file_settings), geometry_of(encoding.model_config), world, sample)
    device = dist.device()
    where = f"{recipe_path} on {counted(world, 'rank')}"
    if device.type != "cuda":
        advice = f"no GPU here; what fits on one says: ilvr-ds plan --config {recipe_path} --gpus {world} --card NAME"
        return [*detail(where, setup, None, None), "", advice]
    name, memory = torch.cuda.get_device_name(device), torch.cuda.get_device_properties(device).total_memory / GIB
    return detail(f"{where} of {name}, {memory:.1f} GiB", setup, memory, find_chip(name))
