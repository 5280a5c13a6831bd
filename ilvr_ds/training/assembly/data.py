"""From opened data sets to windows: which samples, in which micro-batch, with which features."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ilvr_ds import dist
from ilvr_ds.config import Recipe
from ilvr_ds.data.features import open_features
from ilvr_ds.data.loader import (
    Numbers,
    PlannedNumbers,
    SequentialNumbers,
    SetAfterSet,
    WindowDataset,
    WindowLoader,
)
from ilvr_ds.data.mixture import Mixture, MixtureFeatures
from ilvr_ds.data.mixture_plan import MixturePlan, Plan
from ilvr_ds.data.packing import PackedNumbers
from ilvr_ds.engine.networks import Networks
from ilvr_ds.errors import UserError
from ilvr_ds.model.encoding import Encoding, build_dataset
from ilvr_ds.model.tower import tower_identity, tower_settings
from ilvr_ds.tracking.tracker import Tracker
from ilvr_ds.training.assembly.inputs import Inputs, held_out_steps
from ilvr_ds.training.free_answers import build_free_answers
from ilvr_ds.training.held_out import HeldOut, HeldOutSet
from ilvr_ds.training.latent_views import LatentViews
from ilvr_ds.training.pictures import Pictures
from ilvr_ds.training.quarantine import EACH_ALONE
from ilvr_ds.training.quarantines import Quarantines
from ilvr_ds.training.step import TrainingStep

logger = logging.getLogger("ilvr_ds")
_LEFT_OUT = "what an epoch leaves out"
MAX_TYPES = 32


@dataclass(frozen=True)
class RunData:
    """The windows that a run trains on and, where it has held-out data, evaluates on."""

    training: WindowDataset
    held_out: WindowDataset | None
    held_out_sets: list[HeldOutSet]
    types: tuple[str, ...]
    """The kinds of task by which losses are split"""


def open_data(recipe: Recipe, recipe_path: Path, inputs: Inputs, encoding: Encoding) -> RunData:
    """Both data sets, with stored features where the recipe has them (collective). Raises UserError."""
    types = _types(inputs.training)
    tower = None
    if recipe.data.has_features:
        tower = dist.decided_by_main(lambda: tower_identity(recipe.model, encoding.encoder.images))

    def windows(mixture: Mixture, numbers: Callable[[int], Sequence[Numbers]], key: str) -> WindowDataset:
        features = _open_features(recipe, recipe_path, tower, mixture, key) if tower is not None else None
        return build_dataset(recipe, encoding, mixture, numbers, types, features, by_set=mixture is inputs.training)

    planned = planned_numbers(recipe, inputs.plan, inputs.training)
    training = windows(inputs.training, planned, "features")
    if inputs.held_out is None:
        return RunData(training, None, [], types)
    sets = _held_out_sets(recipe, inputs.held_out)
    in_order = SetAfterSet(
        SequentialNumbers(recipe.train.micro_batch_size, dist.rank(), dist.world_size()),
        inputs.held_out.starts.tolist(),
        [len(shards) for shards in inputs.held_out.sets],
        [one.steps for one in sets],
        recipe.evaluation.max_samples,
    )
    return RunData(training, windows(inputs.held_out, in_order, "eval_features"), sets, types)


def check_features(recipe: Recipe, recipe_path: Path, inputs: Inputs, encoding: Encoding) -> None:
    """Raise UserError for stored features that `open_data` would refuse, as far as no weights of the tower are read."""
    known = tower_settings(recipe.model, encoding.encoder.images)
    _open_features(recipe, recipe_path, known, inputs.training, "features")
    if inputs.held_out is not None:
        _open_features(recipe, recipe_path, known, inputs.held_out, "eval_features")


def build_loader(recipe: Recipe, inputs: Inputs, dataset: WindowDataset, state: dict[str, Any] | None) -> WindowLoader:
    """The loader of the training windows. Raises UserError where `state`, a checkpoint's, is of other samples."""
    identity = {
        "data": inputs.training.fingerprint,
        "run.seed": recipe.run.seed,
        "data.lanes": recipe.data.lanes,
        "data.shuffle_buffer": recipe.data.shuffle_buffer,
        "samples per step": inputs.plan.global_batch,
    }
    notes = {}
    if isinstance(inputs.plan, MixturePlan):
        notes = {"mixture": [*zip(inputs.training.names, inputs.plan.rates, strict=True)]}
        identity |= {"rates": list(inputs.plan.rates), "samples an epoch": inputs.plan.epoch_samples}
    elif inputs.plan.remainder:
        identity[_LEFT_OUT] = "drawn"
    on_cuda = dist.device().type == "cuda"
    loader = WindowLoader(dataset, inputs.plan, identity, recipe.data.num_workers, on_cuda, notes)
    if state is not None:
        _check_mixture(state, loader.state_dict())
        _check_left_out(state, identity, inputs.plan)
        loader.check(state)
    return loader


def _check_mixture(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise UserError where a checkpoint was made with another mixture, or one of both with a single data set."""
    if "mixture" not in saved and "mixture" not in now:
        return
    changed = [key for key in ("data", "rates", "samples an epoch") if saved.get(key) != now.get(key)]
    if changed:
        what = " (with other samples in it)" if changed == ["data"] else ""
        raise UserError(
            f"data.shards: the checkpoint was made with {_in_words(saved)}{what}, this run has {_in_words(now)}; go on "
            "with the mixture of then, or take another run.name, with model.init_from to begin from its weights"
        )


def _check_left_out(saved: dict[str, Any], now: dict[str, Any], plan: Plan) -> None:
    """Raise UserError where an older version made the checkpoint, whose order of the samples this one does not have."""
    if _LEFT_OUT in now and _LEFT_OUT not in saved and saved.get("data") == now["data"]:
        raise UserError(
            "checkpoint.resume: the checkpoint is of an older version of ilvr_ds, whose epochs could leave out the "
            f"same {plan.remainder} of {sum(plan.set_sizes)} samples, and this one has another order; "
            "take another run.name, with model.init_from to begin from its weights"
        )


def _in_words(state: dict[str, Any]) -> str:
    if "mixture" not in state:
        return "one data set and no mixture"
    total = sum(rate for _, rate in state["mixture"])
    shares = " + ".join(f"{rate / total:.4g} {name}" for name, rate in state["mixture"])
    return f"{shares}, {state['samples an epoch']} samples an epoch"


def planned_numbers(recipe: Recipe, plan: Plan, data: Mixture) -> PlannedNumbers | PackedNumbers:
    """Which samples this rank takes in which micro-batch; with `micro_batch_tokens` their lengths must be known."""
    train, rank, world = recipe.train, dist.rank(), dist.world_size()
    if not train.micro_batch_tokens:
        return PlannedNumbers(plan, rank, world, train.micro_batch_size)
    tokens = data.tokens.astype(np.int64)
    return PackedNumbers(plan, rank, world, tokens, train.micro_batch_tokens, train.has_free_latents)


def build_held_out(
    recipe: Recipe, inputs: Inputs, encoding: Encoding, data: RunData, step: TrainingStep, networks: Networks
) -> HeldOut | None:
    """What evaluates `step` on held-out samples, where there are any."""
    if data.held_out is None or inputs.held_out is None:
        return None
    quarantine = Quarantines.of(recipe, inputs.held_out, EACH_ALONE)
    free_answers = build_free_answers(recipe, encoding, inputs.held_out, networks)
    return HeldOut(data.held_out, recipe.data.num_workers, data.held_out_sets, step, quarantine, free_answers)


def build_pictures(
    recipe: Recipe, inputs: Inputs, encoding: Encoding, data: RunData, step: TrainingStep, tracker: Tracker
) -> Pictures:
    """What draws the run's curves and a few samples, held-out ones if there are any.

    Every rank looks at the same samples, for the forward is collective.
    """
    source, shown = data.held_out or data.training, inputs.held_out or inputs.training
    count = min(recipe.tracking.picture_samples, len(shown))
    if not count:
        return Pictures(tracker, recipe.run_dir)
    numbers = np.sort(np.random.default_rng(0).choice(len(shown), count, replace=False))  # the same in every run
    encoding = replace(encoding, encoder=encoding.encoder.seeing_helpers())  # without a teacher no step reads them
    dataset = build_dataset(recipe, encoding, shown, lambda _: [numbers], step.types, source.features)
    return Pictures(tracker, recipe.run_dir, LatentViews(dataset, numbers, step))


def _types(data: Mixture) -> tuple[str, ...]:
    """The kinds of task by which losses are split: the largest MAX_TYPES of the training data, in order."""
    groups = {name: count for name, count in data.groups.items() if name}
    largest = sorted(groups, key=lambda name: (-groups[name], name))[:MAX_TYPES]
    if len(largest) < len(groups):
        logger.info("loss/ce_by_type: the %d largest of %d kinds of task", MAX_TYPES, len(groups))
    return tuple(sorted(largest))


def _open_features(
    recipe: Recipe, recipe_path: Path, tower: dict[str, Any], data: Mixture, which: str
) -> MixtureFeatures:
    """The features of each set of `data` where the recipe says; raises UserError for those of another tower or data.

    which: "features", or "eval_features" for held-out data.
    """
    found = []
    entries = recipe.data.sets if which == "features" else recipe.data.held_out_sets
    for entry, shards in zip(entries, data.sets, strict=True):
        key = f"data.shards: {which} of {entry.name}" if entry.name else f"data.{which}"
        assert entry.features is not None, "the recipe's check lets no such set through"
        mend = f"ilvr-ds encode --config {recipe_path} --shards {shards.location} --output FOLDER"
        features = open_features(entry.features, shards, {"data": shards.fingerprint, **tower}, key, mend)
        precision = features.manifest.made_of.get("precision")
        logger.info("%s: %s, from a tower in %s; none is loaded", key, features.storage.label, precision)
        found.append(features)
    return MixtureFeatures(data, found)


def _held_out_sets(recipe: Recipe, data: Mixture) -> list[HeldOutSet]:
    """What is evaluated on."""
    micro, world = recipe.train.micro_batch_size, dist.world_size()
    sets = []
    for name, shards, steps in zip(data.names, data.sets, held_out_steps(recipe, data, world), strict=True):
        of = f" of {name}" if name else ""
        logger.info("evaluation on %d of %d held-out samples%s", steps * micro * world, len(shards), of)
        sets.append(HeldOutSet(name, steps, sorted(shards.manifest.groups)))
    return sets
