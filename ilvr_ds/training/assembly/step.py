"""The step of a recipe's stage: networks, engines and teacher put together."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from ilvr_ds import dist
from ilvr_ds.config import Recipe
from ilvr_ds.distill.ema import MomentumShards
from ilvr_ds.distill.selector import Selector
from ilvr_ds.distill.teacher import MomentumTeacher
from ilvr_ds.engine.initial import load_average
from ilvr_ds.engine.networks import Networks, build_networks
from ilvr_ds.model.encoding import Encoding
from ilvr_ds.model.layers.attention import attention_in_words
from ilvr_ds.model.layers.fused import kernels_in_words
from ilvr_ds.model.vision import VisionTower
from ilvr_ds.training.stage1 import StageOneStep
from ilvr_ds.training.stage2 import StageTwoStep, TaughtStageTwoStep
from ilvr_ds.training.step import TrainingStep

logger = logging.getLogger("ilvr_ds")


def build_step(
    recipe: Recipe,
    file_settings: dict[str, Any],
    encoding: Encoding,
    initial: Path | None = None,
    types: tuple[str, ...] = (),
    longest: int = 0,
    sets: tuple[str, ...] = (),
) -> tuple[TrainingStep, Networks]:
    """Student, vision (tower or stored features), selection and teacher, if any, ready for optimizer steps.
    Collective.

    initial: the checkpoint whose weights the student starts from, where it is not `model.path`. types: the kinds of
    task by which losses are split; sets: the data sets of a mixture. longest: tokens of the longest sample; 0: as long
    as any may be.
    """
    images, vocabulary = encoding.encoder.images, len(encoding.encoder.tokenizer)
    stats = (images.mean, images.std)
    networks = build_networks(recipe, file_settings, encoding.model_config, vocabulary, stats, initial)
    _log_networks(networks)
    student, vision, size = networks.student, networks.vision, recipe.model.latent_size
    if not recipe.has_targets:
        return StageTwoStep(student, vision, size, types, sets), networks
    selector = Selector(recipe.selection, size, encoding.model_config.text_config.hidden_size)
    teacher = None
    if recipe.has_teacher:
        teacher = _build_teacher(recipe, networks, initial, longest or recipe.data.max_tokens)
    else:
        logger.info("no teacher: what changed alone decides (selection.unchanged is %s)", recipe.selection.unchanged)
    kind = TaughtStageTwoStep if recipe.train.has_free_latents else StageOneStep
    return kind(student, vision, selector, teacher, recipe.loss, types, sets), networks


def _build_teacher(recipe: Recipe, networks: Networks, initial: Path | None, longest: int) -> MomentumTeacher:
    momentum = recipe.teacher.momentum
    shards = MomentumShards(networks.teacher_shards(), networks.student_shards(), momentum, dist.device())
    if initial is not None and recipe.train.has_free_latents:
        load_average(initial, networks.trained, shards)
    return MomentumTeacher(
        networks.teacher,
        shards,
        networks.student_shards,
        _micro_batches_at_once(recipe, longest),
    )


def _micro_batches_at_once(recipe: Recipe, longest: int) -> int:
    """Micro-batches that the teacher reads in one forward: the same number on all ranks, whatever their samples.

    longest: tokens of the longest sample.
    """
    largest = recipe.train.micro_batch_tokens or recipe.train.micro_batch_size * longest
    return max(1, recipe.teacher.max_tokens // largest)


def _log_networks(networks: Networks) -> None:
    language_model = networks.student.module.model.model.language_model
    attention, kernels = attention_in_words(language_model), kernels_in_words(language_model)
    tower = f", vision tower {networks.vision.attention}" if isinstance(networks.vision, VisionTower) else ""
    logger.info("attention: language model %s%s", attention, tower)
    logger.info("layers: %s; ZeRO stage %d", kernels, networks.zero_stage)
