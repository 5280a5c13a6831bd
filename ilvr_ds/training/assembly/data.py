"""From opened data sets to windows: which samples, in which micro-batch, with which features."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ilvr_ds import dist
from ilvr_ds.config import Recipe
from ilvr_ds.data.features import FeatureSet, open_features
from ilvr_ds.data.loader import Numbers, PlannedNumbers, SequentialNumbers, WindowDataset, WindowLoader
from ilvr_ds.data.packing import PackedNumbers
from ilvr_ds.data.plan import SamplePlan
from ilvr_ds.data.shards import ShardSet
from ilvr_ds.engine.networks import Networks
from ilvr_ds.errors import UserError, counted
from ilvr_ds.model.encoding import Encoding, build_dataset
from ilvr_ds.model.tower import tower_identity
from ilvr_ds.tracking.tracker import Tracker
from ilvr_ds.training.assembly.inputs import Inputs
from ilvr_ds.training.free_answers import build_free_answers
from ilvr_ds.training.held_out import HeldOut
from ilvr_ds.training.latent_views import LatentViews
from ilvr_ds.training.pictures import Pictures
from ilvr_ds.training.quarantine import Quarantine
from ilvr_ds.training.step import TrainingStep

logger = logging.getLogger("ilvr_ds")
MAX_TYPES = 32


@dataclass(frozen=True)
class RunData:
    """The windows that a run trains on and, where it has held-out data, evaluates on."""

    training: WindowDataset
    held_out: WindowDataset | None
    held_out_steps: int
    """Windows of each rank in an evaluation"""
    types: tuple[str, ...]
    """The kinds of task by which losses are split"""


def open_data(recipe: Recipe, recipe_path: Path, inputs: Inputs, encoding: Encoding) -> RunData:
    """Both data sets, with stored features where the recipe has them (collective). Raises UserError."""
    types = _types(inputs.training)
    tower = None
    if recipe.data.features is not None:
        tower = dist.decided_by_main(lambda: tower_identity(recipe.model, encoding.encoder.images))

    def windows(shards: ShardSet, numbers: Callable[[int], Sequence[Numbers]], key: str) -> WindowDataset:
        features = _open_features(recipe, recipe_path, tower, shards, key) if tower is not None else None
        return build_dataset(recipe, encoding, shards, numbers, types, features)

    planned = planned_numbers(recipe, inputs.plan, inputs.training, inputs.are_measured)
    training = windows(inputs.training, planned, "data.features")
    if inputs.held_out is None:
        return RunData(training, None, 0, types)
    steps = _held_out_steps(recipe, inputs.held_out)
    in_order = SequentialNumbers(recipe.train.micro_batch_size, dist.rank(), dist.world_size())
    return RunData(training, windows(inputs.held_out, in_order, "data.eval_features"), steps, types)


def build_loader(recipe: Recipe, inputs: Inputs, dataset: WindowDataset, state: dict[str, Any] | None) -> WindowLoader:
    """The loader of the training windows. Raises UserError where `state`, a checkpoint's, is of other samples."""
    identity = {
        "data": inputs.training.fingerprint,
        "run.seed": recipe.run.seed,
        "data.lanes": recipe.data.lanes,
        "data.shuffle_buffer": recipe.data.shuffle_buffer,
        "samples per step": inputs.plan.global_batch,
    }
    loader = WindowLoader(dataset, inputs.plan, identity, recipe.data.num_workers, dist.device().type == "cuda")
    if state is not None:
        loader.check(state)
    return loader


def planned_numbers(
    recipe: Recipe, plan: SamplePlan, shards: ShardSet, are_measured: bool
) -> PlannedNumbers | PackedNumbers:
    """Which samples this rank takes in which micro-batch; raises UserError where lengths are needed and not known."""
    train, rank, world = recipe.train, dist.rank(), dist.world_size()
    if not train.micro_batch_tokens:
        return PlannedNumbers(plan, rank, world, train.micro_batch_size)
    if not are_measured:
        raise UserError(
            f"train.micro_batch_tokens: the lengths of the samples in {shards.location} are not known; pack them again "
            "with this recipe (ilvr-ds pack --config)"
        )
    return PackedNumbers(plan, rank, world, shards.tokens.astype(np.int64), train.micro_batch_tokens)


def longest_samples(recipe: Recipe, shards: ShardSet) -> list[NDArray[np.int64]]:
    """The micro-batches of a step on a rank, made of the longest samples: no real window exceeds it.

    The first micro-batch is as large as one can become. A data set with fewer samples repeats them.
    """
    train, lengths = recipe.train, shards.tokens.astype(np.int64)
    size, samples = train.micro_batch_size, train.micro_batch_size * train.grad_accum_steps
    numbers = np.resize(np.argsort(-lengths, kind="stable")[:samples], samples)
    if not train.micro_batch_tokens:
        return np.split(numbers, range(size, samples, size))
    cuts, room = [], train.micro_batch_tokens
    for place, length in enumerate(lengths[numbers].tolist()):
        if length > room:
            cuts.append(place)
            room = train.micro_batch_tokens
        room -= length
    return np.split(numbers, cuts)


def build_held_out(
    recipe: Recipe, encoding: Encoding, data: RunData, step: TrainingStep, networks: Networks
) -> HeldOut | None:
    """What evaluates `step` on held-out samples, where there are any."""
    if data.held_out is None:
        return None
    shards, workers = data.held_out.reader.shard_set, recipe.data.num_workers
    groups, quarantine = sorted(shards.manifest.groups), Quarantine.of(recipe, shards)
    free_answers = build_free_answers(recipe, encoding, shards, networks)
    return HeldOut(data.held_out, workers, data.held_out_steps, groups, step, quarantine, free_answers)


def build_pictures(recipe: Recipe, encoding: Encoding, data: RunData, step: TrainingStep, tracker: Tracker) -> Pictures:
    """What draws the run's curves and a few samples, held-out ones if there are any.

    Every rank looks at the same samples, for the forward is collective.
    """
    source = data.training if data.held_out is None else data.held_out
    shards = source.reader.shard_set
    count = min(recipe.tracking.picture_samples, len(shards))
    if not count:
        return Pictures(tracker, recipe.run_dir)
    numbers = np.sort(np.random.default_rng(0).choice(len(shards), count, replace=False))  # the same in every run
    encoding = replace(encoding, encoder=encoding.encoder.seeing_helpers())  # without a teacher no step reads them
    dataset = build_dataset(recipe, encoding, shards, lambda _: [numbers], step.types, source.features)
    return Pictures(tracker, recipe.run_dir, LatentViews(dataset, numbers, step))


def _types(shards: ShardSet) -> tuple[str, ...]:
    """The kinds of task by which losses are split: the largest MAX_TYPES of the training data, in order."""
    groups = {name: count for name, count in shards.manifest.groups.items() if name}
    largest = sorted(groups, key=lambda name: (-groups[name], name))[:MAX_TYPES]
    if len(largest) < len(groups):
        logger.info("loss/ce_by_type: the %d largest of %d kinds of task", MAX_TYPES, len(groups))
    return tuple(sorted(largest))


def _open_features(recipe: Recipe, recipe_path: Path, tower: dict[str, Any], shards: ShardSet, key: str) -> FeatureSet:
    """The features of `shards` where the recipe's `key` says; raises UserError for those of another tower or data."""
    mend = f"ilvr-ds encode --config {recipe_path} --shards {shards.location} --output FOLDER"
    made_of = {"data": shards.fingerprint, **tower}
    features = open_features(recipe.flat()[key], shards, made_of, key, mend)
    precision = features.manifest.made_of.get("precision")
    logger.info("%s: %s, from a tower in %s; none is loaded", key, features.storage.label, precision)
    return features


def _held_out_steps(recipe: Recipe, shards: ShardSet) -> int:
    """Windows of each rank in an evaluation; raises UserError where there is none for each."""
    micro, world = recipe.train.micro_batch_size, dist.world_size()
    steps = min(recipe.evaluation.max_samples, len(shards)) // (micro * world)
    if steps == 0:
        raise UserError(
            f"data.eval_shards: {shards.location} and evaluation.max_samples leave no whole micro-batch of {micro} "
            f"samples for each of {counted(world, 'rank')}"
        )
    logger.info("evaluation on %d of %d held-out samples", steps * micro * world, len(shards))
    return steps
