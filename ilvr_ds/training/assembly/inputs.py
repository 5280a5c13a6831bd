"""A run's data and settings, read and checked before its ranks meet: a mistake costs no minutes of compiling."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from ilvr_ds.config import DataSetConfig, Recipe, TeacherConfig, TrainConfig
from ilvr_ds.data.mixture import Mixture
from ilvr_ds.data.mixture_plan import Plan, build_plan
from ilvr_ds.data.packing import PackedNumbers
from ilvr_ds.data.plan import Int64
from ilvr_ds.data.shards import ShardSet
from ilvr_ds.data.tokens import has_latent_tokens
from ilvr_ds.engine.optimizer import check_optimizer
from ilvr_ds.engine.settings import read_deepspeed_json
from ilvr_ds.errors import UserError, counted
from ilvr_ds.model.layers.four_bit import check_base
from ilvr_ds.model.layers.fused import check_kernels

logger = logging.getLogger("ilvr_ds")


@dataclass(frozen=True)
class Inputs:
    """Data and settings of a run, as this rank reads them, without communication."""

    training: Mixture
    held_out: Mixture | None
    plan: Plan
    file_settings: dict[str, Any]
    """DeepSpeed's settings from the file `deepspeed.config`."""
    other_measure: tuple[str, ...]
    """Settings other than the recipe's with which the lengths of the training samples were measured."""
    held_out_measure: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """The same of those held-out data sets that were measured so, by location."""

    @staticmethod
    def read(recipe: Recipe, recipe_path: Path, world: int) -> Inputs:
        """The inputs of a job of `world` ranks. Raises UserError."""
        check_kernels(recipe.model.kernels)
        check_base(recipe.model.lora_base)
        file_settings = read_deepspeed_json(recipe.deepspeed.config, recipe_path.parent)
        check_optimizer(recipe.optim.name, file_settings)
        training = _open(recipe, recipe.data.sets, "data.shards")
        training.check_measured_alike()
        held_out = _open(recipe, recipe.data.held_out_sets, "eval_shards") if recipe.data.held_out_sets else None
        other_measure = _other_measure(recipe, training.sets)
        for shards in training.sets if not other_measure else ():
            _check_longest(recipe, shards)
        held_out_measure = {}
        if held_out is not None:
            held_out_measure = _check_held_out(recipe, held_out)
            held_out_steps(recipe, held_out, world)
        plan = build_plan(recipe, training, world)
        inputs = Inputs(training, held_out, plan, file_settings, other_measure, held_out_measure)
        if recipe.train.micro_batch_tokens:
            inputs._check_lengths(recipe, world)
        return inputs

    def _check_lengths(self, recipe: Recipe, world: int) -> None:
        """Raise UserError where micro-batches cannot be filled by tokens."""
        if not self.are_measured:
            raise UserError(
                f"train.micro_batch_tokens: the lengths of the samples in {self.training.location} are not known; "
                "pack them again with this recipe (ilvr-ds pack --config)"
            )
        PackedNumbers(self.plan, 0, world, self.lengths, recipe.train.micro_batch_tokens)

    @property
    def are_measured(self) -> bool:
        """Whether the lengths of the training samples are known, measured with settings like the recipe's."""
        return self.training.longest_tokens > 0 and not self.other_measure

    @property
    def lengths(self) -> Int64:
        """[training samples]: tokens of each; 0 where it was not measured."""
        return self.training.tokens.astype(np.int64)

    @property
    def longest(self) -> int:
        """Tokens of the longest training sample; 0 where lengths are not known."""
        return self.training.longest_tokens if self.are_measured else 0


def held_out_steps(recipe: Recipe, held_out: Mixture, world: int) -> list[int]:
    """Steps of an evaluation on each set; raises UserError where a set has no micro-batch for each of `world` ranks."""
    a_step, most = recipe.train.micro_batch_size * world, recipe.evaluation.max_samples
    for name, shards in zip(held_out.names, held_out.sets, strict=True):
        if (count := min(most, len(shards))) < a_step:
            key = _held_out_key(name)
            limit = " (evaluation.max_samples)" if most < len(shards) else ""
            raise UserError(
                f"{key}: {shards.location} has {counted(count, 'sample')}{limit}, of which a step of evaluation takes "
                f"{a_step} (train.micro_batch_size for each of {counted(world, 'rank')}); pack at least {a_step}, "
                "lower train.micro_batch_size, or set data.eval_shards to null"
            )
    return [min(most, len(shards)) // a_step for shards in held_out.sets]


def say_what_does_nothing(recipe: Recipe, inputs: Inputs, total_steps: int) -> None:
    """Warn of settings that have no effect."""
    if inputs.other_measure and any(shards.manifest.longest_tokens for shards in inputs.training.sets):
        logger.warning(
            "%s: its lengths were measured with %s and do not count; pack again to have them checked and rehearsed",
            inputs.training.location, ", ".join(inputs.other_measure),
        )  # fmt: skip
    for location, other in inputs.held_out_measure.items():
        logger.warning(
            "%s: its lengths were measured with %s and do not count; pack again to have them checked",
            location, ", ".join(other),
        )  # fmt: skip
    unmeasured = [shards.location for shards in inputs.training.sets if not shards.manifest.longest_tokens]
    if 0 < len(unmeasured) < len(inputs.training.sets):
        logger.warning(
            "lengths of the other data sets do not count, because those in %s were not measured; pack with --config",
            ", ".join(unmeasured),
        )
    warmup, every = recipe.optim.warmup_steps, recipe.evaluation.every_steps
    if warmup > total_steps:
        logger.warning("optim.warmup_steps is %d, but the run has %d: optim.lr is never reached", warmup, total_steps)
    if every and inputs.held_out is None:
        logger.warning("evaluation.every_steps is %d, but data.eval_shards is null: nothing is evaluated", every)
    selection, optim, train = recipe.selection, recipe.optim, recipe.train
    for name, value in (("pool_size", selection.pool_size), ("pool_min", selection.pool_min)):
        if value and selection.pool != "changed":
            logger.warning(
                "selection.%s is %d, which is for selection.pool: changed; here it is %s", name, value, selection.pool
            )
    if recipe.has_targets and not recipe.has_teacher:
        for key in fields(TeacherConfig):
            if (value := getattr(recipe.teacher, key.name)) != key.default:
                logger.warning(
                    "teacher.%s is %s, but selection.unchanged is %s: there is no teacher",
                    key.name, value, selection.unchanged,
                )  # fmt: skip
    if optim.min_lr_ratio and optim.schedule == "constant":
        logger.warning("optim.min_lr_ratio is %g, but optim.schedule is constant: optim.lr stays", optim.min_lr_ratio)
    if train.latent_gradient != TrainConfig.latent_gradient and not train.has_free_latents:
        logger.warning("train.latent_gradient is %s, which is for train.stage 2", train.latent_gradient)


def say_where_latents_are_new(recipe: Recipe) -> None:
    """Warn where stage 2 starts from a model at `model.path` that never learnt latents."""
    if recipe.train.has_free_latents and not has_latent_tokens(recipe.model.path):
        logger.warning(
            "train.stage is 2, but %s has no latent tokens: it never learnt latents; set model.init_from to a run of "
            "stage 1, or model.path to a model that was exported from one",
            recipe.model.path,
        )


def _open(recipe: Recipe, entries: Sequence[DataSetConfig], key: str) -> Mixture:
    mixture = Mixture.open(entries, key)
    for shards in mixture.sets:
        shards.check_trainable()
        if recipe.selection.pool == "region" and recipe.has_targets:
            shards.check_regions()
    return mixture


def _held_out_key(name: str) -> str:
    """Where a recipe names the held-out data of a set."""
    return f"eval_shards of {name}" if name else "data.eval_shards"


def _check_held_out(recipe: Recipe, held_out: Mixture) -> dict[str, tuple[str, ...]]:
    """Raise UserError for samples that are too long; returns the sets that were measured otherwise, and how."""
    others = {}
    for name, shards in zip(held_out.names, held_out.sets, strict=True):
        if other := _other_measure(recipe, [shards]):
            others[shards.location] = other
        else:
            _check_longest(recipe, shards, f"{_held_out_key(name)} ({shards.location})")
    return others


def _check_longest(recipe: Recipe, shards: ShardSet, where: str = "") -> None:
    longest = shards.manifest.longest_tokens
    if longest > recipe.data.max_tokens:
        raise UserError(
            f"data.max_tokens is {recipe.data.max_tokens}, but {where or shards.location} holds a sample of {longest} "
            "tokens; raise it, or pack the data again with this recipe (ilvr-ds pack --config)"
        )


def _other_measure(recipe: Recipe, sets: Sequence[ShardSet]) -> tuple[str, ...]:
    """Settings of the first measured set; all measured ones have the same."""
    now, settings = recipe.flat(), [shards.manifest.tokens_measured_with for shards in sets]
    measured: dict[str, Any] = next((found for found in settings if found is not None), {})
    return tuple(f"{key} = {value} (here {now.get(key)})" for key, value in measured.items() if now.get(key) != value)
