"""From a recipe to the parts of a run: data, networks, teacher, tracking. Everything is checked before weights load."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ilvr_ds import dist
from ilvr_ds.base_model import model_on_host
from ilvr_ds.checkpoint.load import check_fits, find_checkpoint, saved_state
from ilvr_ds.checkpoint.reshard import needs_resharding, reshard
from ilvr_ds.checkpoint.writer import CheckpointWriter
from ilvr_ds.config import Recipe
from ilvr_ds.data.features import FeatureSet, open_features
from ilvr_ds.data.loader import PlannedNumbers, SequentialNumbers, WindowDataset, WindowLoader
from ilvr_ds.data.packing import PackedNumbers
from ilvr_ds.data.plan import SamplePlan
from ilvr_ds.data.shards import ShardSet, open_dataset
from ilvr_ds.distill.ema import MomentumShards
from ilvr_ds.distill.teacher import MomentumTeacher
from ilvr_ds.engine.initial import find_initial, load_average
from ilvr_ds.engine.networks import (
    Networks,
    build_networks,
    check_optimizer,
)
from ilvr_ds.engine.settings import deepspeed_settings, read_deepspeed_json
from ilvr_ds.errors import UserError
from ilvr_ds.model.attention import attention_in_words
from ilvr_ds.model.encoding import Encoding, build_dataset, build_encoding
from ilvr_ds.model.four_bit import check_base
from ilvr_ds.model.fused import check_kernels, kernels_in_words
from ilvr_ds.model.tower import tower_identity
from ilvr_ds.model.vision import VisionTower
from ilvr_ds.monitoring.throughput import Throughput, model_flops, peak_flops
from ilvr_ds.monitoring.watchdog import Watchdog
from ilvr_ds.provenance import environment, machine
from ilvr_ds.tracking.mlflow_copy import PARENT_TAG, read_state
from ilvr_ds.tracking.tracker import Tracker, TrackingTarget
from ilvr_ds.training.gaze import Gaze
from ilvr_ds.training.held_out import HeldOut
from ilvr_ds.training.pictures import Pictures
from ilvr_ds.training.quarantine import Quarantine
from ilvr_ds.training.stage2 import StageTwoStep, TaughtStageTwoStep
from ilvr_ds.training.step import StageOneStep, TrainingStep
from ilvr_ds.training.trainer import Parts

logger = logging.getLogger("ilvr_ds")
MAX_TYPES = 32


def assemble(recipe: Recipe, recipe_path: Path) -> Parts:
    """Build a run (collective). Raises UserError for everything that a person can mend."""
    checkpoint = find_checkpoint(recipe)
    check_kernels(recipe.model.kernels)
    check_base(recipe.model.lora_base)
    initial = None if checkpoint else dist.decided_by_main(lambda: find_initial(recipe))
    parent = dist.decided_by_main(lambda: _mlflow_run(initial)) if initial else None
    file_settings = read_deepspeed_json(recipe.deepspeed.config, recipe_path.parent)
    check_optimizer(recipe.optim.name, file_settings)
    stored = replace(recipe, model=replace(recipe.model, path=model_on_host(recipe.model.path)))
    encoding = build_encoding(stored)
    shards = open_dataset(recipe.data.shards)
    shards.check_trainable()
    are_measured = _check_lengths(recipe, shards)
    train, world = recipe.train, dist.world_size()
    plan = SamplePlan(
        shards.shard_sizes,
        recipe.run.seed,
        recipe.data.lanes,
        train.micro_batch_size * train.grad_accum_steps * world,
        recipe.data.shuffle_window,
    )
    plan.check_world(world)
    total = train.max_steps or train.epochs * plan.steps_per_epoch
    logger.info(
        "%d samples, %d a step on %d ranks, %d steps an epoch, %d samples left out of each epoch, %d steps in all",
        len(shards), plan.global_batch, world, plan.steps_per_epoch, plan.remainder, total,
    )  # fmt: skip
    types = _types(shards)
    feature_sets = _StoredFeatures.of(stored, recipe_path, encoding)
    features = feature_sets.open(shards, "data.features") if feature_sets else None
    numbers = planned_numbers(recipe, plan, shards, are_measured)
    dataset = build_dataset(recipe, encoding, shards, numbers, types, features)
    identity = {
        "data": shards.fingerprint,
        "run.seed": recipe.run.seed,
        "data.lanes": recipe.data.lanes,
        "data.shuffle_window": recipe.data.shuffle_window,
        "samples per step": plan.global_batch,
    }
    state = check_fits(checkpoint, recipe) if checkpoint else {}
    loader = WindowLoader(dataset, plan, identity, recipe.data.num_workers, dist.device().type == "cuda")
    if state:
        loader.check(state["loader"])
    held_out = _held_out_dataset(recipe, encoding, types, feature_sets)
    zero_stage = int(file_settings.get("zero_optimization", {}).get("stage", 0))
    is_resharded = checkpoint is not None and needs_resharding(state, zero_stage)
    if checkpoint and is_resharded:
        reshard(checkpoint, state, zero_stage, recipe)
        file_settings = {**file_settings, "checkpoint": {"load_universal": True}}
    step, networks = build_step(stored, file_settings, encoding, initial, types)
    datasets, evaluation = {"training": shards}, None
    if held_out:
        datasets["evaluation"] = held_out[0].reader.shard_set
        evaluation = HeldOut(*held_out, step, _quarantine(recipe, datasets["evaluation"]))
    is_own = checkpoint is not None and checkpoint.absolute().parent == (recipe.run_dir / "checkpoints").absolute()
    run_id = state.get("mlflow_run_id") if is_own else None  # from another run's checkpoint this is a new run
    tracker = _tracker(recipe, file_settings, datasets, checkpoint is not None, run_id, parent)
    save = recipe.checkpoint
    writer = CheckpointWriter(
        recipe.run_dir / "checkpoints", networks.student, networks.trained,
        step.teacher,
        save.keep_last, save.keep_every, save.background,
    )  # fmt: skip
    watchdog = Watchdog(
        recipe.run.rank_timeout_s, recipe.run.stall_timeout_s, lambda: tracker.close("FAILED", timeout_s=10)
    )
    return Parts(
        recipe=recipe,
        loader=loader,
        step=step,
        trained=networks.trained,
        zero_stage=zero_stage,
        held_out=evaluation,
        tracker=tracker,
        pictures=_pictures(recipe, encoding, held_out[0] if held_out else dataset, step, tracker),
        writer=writer,
        watchdog=watchdog,
        speed=Throughput(
            model_flops(networks.student.module, encoding.model_config, step.teacher is not None),
            peak_flops(dist.device()),
        ),
        quarantine=_quarantine(recipe, shards),
        total_steps=total,
        rehearsal=_rehearsal(recipe, shards) if are_measured else None,
        checkpoint=checkpoint,
        is_resharded=is_resharded,
    )


def build_step(
    recipe: Recipe,
    file_settings: dict[str, Any],
    encoding: Encoding,
    initial: Path | None = None,
    types: tuple[str, ...] = (),
) -> tuple[TrainingStep, Networks]:
    """Student, tower (or what stands for it) and teacher, if any, ready to compute optimizer steps (collective).

    initial: the checkpoint whose weights the student starts from, where it is not `model.path`. types: the kinds of
    task by which losses are split.
    """
    images = encoding.encoder.images
    networks = build_networks(
        recipe,
        file_settings,
        encoding.model_config,
        len(encoding.encoder.tokenizer),
        (images.mean, images.std),
        initial,
    )
    language_model = networks.student.module.model.model.language_model
    attention, kernels = attention_in_words(language_model), kernels_in_words(language_model)
    tower = f", vision tower {networks.vision.attention}" if isinstance(networks.vision, VisionTower) else ""
    logger.info("attention: language model %s%s", attention, tower)
    logger.info("layers: %s; ZeRO stage %d", kernels, networks.zero_stage)
    if networks.teacher is None:
        return StageTwoStep(networks.student, networks.vision, recipe.model.latent_size, types), networks
    shards = MomentumShards(
        networks.teacher_shards(), networks.student_shards(), recipe.teacher.momentum, dist.device()
    )
    if initial is not None and recipe.train.has_free_latents:
        load_average(initial, networks.trained, shards)
    teacher = MomentumTeacher(
        networks.teacher, shards, networks.student_shards, recipe.selection, recipe.model.latent_size
    )
    if not recipe.train.has_free_latents:
        return StageOneStep(networks.student, networks.vision, teacher, recipe.loss, types), networks
    size = recipe.model.latent_size
    return TaughtStageTwoStep(networks.student, networks.vision, teacher, recipe.loss, types, size), networks


def _check_lengths(recipe: Recipe, shards: ShardSet) -> bool:
    """Refuse a data set whose samples are too long, before anything is loaded.

    Returns whether its lengths are known: measured, and with settings like the recipe's.
    """
    longest, now = shards.manifest.longest_tokens, recipe.flat()
    measured = shards.manifest.tokens_measured_with or {}
    other = [f"{key} = {value} (here {now[key]})" for key, value in measured.items() if now.get(key) != value]
    if longest and other:
        dist.warn(
            "%s: its lengths were measured with %s and do not count; pack again to have them checked and rehearsed",
            shards.location, ", ".join(other),
        )  # fmt: skip
        return False
    if longest > recipe.data.max_tokens:
        raise UserError(
            f"data.max_tokens is {recipe.data.max_tokens}, but {shards.location} holds a sample of {longest} tokens; "
            f"raise it, or pack the data again with this recipe (ilvr-ds pack --config)"
        )
    return longest > 0


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


def _rehearsal(recipe: Recipe, shards: ShardSet) -> list[NDArray[np.int64]]:
    """The longest sample, as often as a step has samples, in micro-batches as large as they can become."""
    train, longest = recipe.train, int(np.argmax(shards.tokens))
    size, samples = train.micro_batch_size, train.micro_batch_size * train.grad_accum_steps
    if train.micro_batch_tokens:
        size = train.micro_batch_tokens // int(shards.tokens[longest])
    numbers = np.full(samples, longest)
    return np.split(numbers, range(size, samples, size))


def _types(shards: ShardSet) -> tuple[str, ...]:
    """The kinds of task by which losses are split: the largest MAX_TYPES of the training data, in order."""
    groups = {name: count for name, count in shards.manifest.groups.items() if name}
    largest = sorted(groups, key=lambda name: (-groups[name], name))[:MAX_TYPES]
    if len(largest) < len(groups):
        logger.info("loss/ce_by_type: the %d largest of %d kinds of task", MAX_TYPES, len(groups))
    return tuple(sorted(largest))


@dataclass(frozen=True)
class _StoredFeatures:
    """Opens the recipe's stored features: those of its tower and image settings, and no others."""

    recipe: Recipe
    recipe_path: Path
    tower: dict[str, Any]

    @staticmethod
    def of(recipe: Recipe, recipe_path: Path, encoding: Encoding) -> _StoredFeatures | None:
        """None where images go through the tower. Collective: the main rank reads the tower's weights for all."""
        if recipe.data.features is None:
            return None
        tower = dist.decided_by_main(lambda: tower_identity(recipe.model, encoding.encoder.images))
        return _StoredFeatures(recipe, recipe_path, tower)

    def open(self, shards: ShardSet, key: str) -> FeatureSet:
        """The features of `shards`, at the place that the recipe's `key` names."""
        mend = f"ilvr-ds encode --config {self.recipe_path} --shards {shards.location} --output FOLDER"
        made_of = {"data": shards.fingerprint, **self.tower}
        features = open_features(self.recipe.flat()[key], shards, made_of, key, mend)
        precision = features.manifest.made_of.get("precision")
        logger.info("%s: %s, from a tower in %s; none is loaded", key, features.storage.label, precision)
        return features


def _held_out_dataset(
    recipe: Recipe, encoding: Encoding, types: tuple[str, ...], stored: _StoredFeatures | None
) -> tuple[WindowDataset, int, int, list[str]] | None:
    """The evaluation data, loader workers, the number of windows of each rank, and the kinds of task."""
    if recipe.data.eval_shards is None:
        return None
    shards = open_dataset(recipe.data.eval_shards)
    shards.check_trainable()
    micro, world = recipe.train.micro_batch_size, dist.world_size()
    steps = min(recipe.evaluation.max_samples, len(shards)) // (micro * world)
    if steps == 0:
        raise UserError(
            f"data.eval_shards: {shards.location} and evaluation.max_samples leave no whole micro-batch of {micro} "
            f"samples for each of {world} ranks"
        )
    logger.info("evaluation on %d of %d held-out samples", steps * micro * world, len(shards))
    features = stored.open(shards, "data.eval_features") if stored else None
    numbers = SequentialNumbers(micro, dist.rank(), world)
    dataset = build_dataset(recipe, encoding, shards, numbers, types, features)
    return dataset, recipe.data.num_workers, steps, sorted(shards.manifest.groups)


def _pictures(
    recipe: Recipe, encoding: Encoding, source: WindowDataset, step: TrainingStep, tracker: Tracker
) -> Pictures:
    """Draws a few samples of `source`; every rank looks at the same ones, for every rank has a part in it."""
    shards = source.reader.shard_set
    count = min(recipe.tracking.picture_samples, len(shards))
    if not count:
        return Pictures(tracker, recipe.run_dir)
    numbers = np.sort(np.random.default_rng(0).choice(len(shards), count, replace=False))  # the same in every run
    encoding = replace(encoding, encoder=encoding.encoder.seeing_helpers())  # without a teacher no step reads them
    dataset = build_dataset(recipe, encoding, shards, lambda _: [numbers], step.types, source.features)
    return Pictures(tracker, recipe.run_dir, Gaze(dataset, numbers, step))


def _quarantine(recipe: Recipe, shards: ShardSet) -> Quarantine:
    return Quarantine(recipe.run_dir, shards, recipe.data.max_bad_fraction, dist.is_main())


def _tracker(
    recipe: Recipe,
    file_settings: dict[str, Any],
    datasets: dict[str, ShardSet],
    goes_on: bool,
    mlflow_run_id: str | None,
    parent: str | None,
) -> Tracker:
    """The run's record; on the main rank the resolved settings and where it runs are written beside it (collective).

    parent: MLflow's id of the run whose weights this one starts from.
    """
    directory, tracking = recipe.run_dir, recipe.tracking
    root = Path(recipe.run.output_dir)
    here = environment(dist.gather_on_host(machine(dist.device())))
    deepspeed_json = deepspeed_settings(recipe, file_settings)
    settings = {"recipe.json": recipe.to_dict(), "deepspeed.json": deepspeed_json, "environment.json": here}
    shards = datasets["training"]
    dist.decided_by_main(lambda: _write_settings(directory, settings))
    return Tracker(
        directory,
        TrackingTarget(tracking.uri, tracking.experiment, recipe.run.name, root, tracking.parent),
        params={**recipe.flat(), **_flat("ds", deepspeed_json)},
        tags={
            "stage": str(recipe.train.stage),
            "base_model": recipe.model.path,
            "world_size": str(dist.world_size()),
            "data": shards.location,
            "data.fingerprint": shards.fingerprint,
            "host": here["ranks"][0]["host"],
            "hosts": ", ".join(sorted({rank["host"] for rank in here["ranks"]})),
            "device": here["ranks"][0]["device"],
            "command": here["command"],
            "git.commit": here["git_commit"],
            "git.dirty": str(here["git_dirty"]).lower(),
            **{f"version.{name}": found for name, found in here["versions"].items()},
            **({PARENT_TAG: parent} if parent else {}),
        },
        datasets=[_dataset_entry(context, data) for context, data in datasets.items()],
        artifacts=[directory / name for name in settings],
        is_writer=dist.is_main(),
        goes_on=goes_on,
        run_id=mlflow_run_id,
    )


def _mlflow_run(checkpoint: Path) -> str | None:
    """MLflow's id of the run that a checkpoint is of: its copy's, which may have come after the checkpoint."""
    return read_state(checkpoint.parent.parent / "mlflow.json").run_id or saved_state(checkpoint).get("mlflow_run_id")


def _dataset_entry(context: str, shards: ShardSet) -> dict[str, Any]:
    """What MLflow is told of a data set; its digest is short: the whole fingerprint stands in the profile."""
    manifest = shards.manifest
    return {
        "name": manifest.name,
        "digest": shards.fingerprint[:12],
        "source": shards.location,
        "context": context,
        "profile": {
            "samples": manifest.samples,
            "groups": manifest.groups,
            "size_bytes": manifest.size_bytes,
            "rejected": manifest.rejected,
            "longest_tokens": manifest.longest_tokens,
            "fingerprint": shards.fingerprint,
        },
    }


def _flat(prefix: str, value: Any) -> dict[str, Any]:
    """Nested settings as dotted names."""
    if not isinstance(value, dict):
        return {prefix: value}
    return {name: leaf for key, inner in value.items() for name, leaf in _flat(f"{prefix}.{key}", inner).items()}


def _write_settings(directory: Path, settings: dict[str, Any]) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in settings.items():
            (directory / name).write_text(json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"run.output_dir: cannot write to {directory} ({error.strerror})") from error
