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
from ilvr_ds.base_model import commit_of, model_on_host
from ilvr_ds.checkpoint.find import find_checkpoint, is_another_way, is_of_run, leave_newer, remember
from ilvr_ds.checkpoint.load import LAYERS, check_fits, check_frozen_is_the_same, commit_of_base, saved_state
from ilvr_ds.checkpoint.reshard import needs_resharding, reshard
from ilvr_ds.checkpoint.writer import CheckpointWriter
from ilvr_ds.config import Recipe
from ilvr_ds.data.features import FeatureSet, open_features
from ilvr_ds.data.loader import PlannedNumbers, SequentialNumbers, WindowDataset, WindowLoader
from ilvr_ds.data.packing import PackedNumbers
from ilvr_ds.data.plan import SamplePlan
from ilvr_ds.data.shards import ShardSet
from ilvr_ds.distill.ema import MomentumShards
from ilvr_ds.distill.teacher import MomentumTeacher
from ilvr_ds.engine.initial import find_initial, load_average
from ilvr_ds.engine.networks import Networks, build_networks
from ilvr_ds.engine.settings import deepspeed_settings
from ilvr_ds.errors import UserError, counted
from ilvr_ds.model.attention import attention_in_words
from ilvr_ds.model.encoding import Encoding, build_dataset, build_encoding
from ilvr_ds.model.fused import kernels_in_words
from ilvr_ds.model.tower import tower_identity
from ilvr_ds.model.vision import VisionTower
from ilvr_ds.monitoring.throughput import Throughput, model_flops, peak_flops
from ilvr_ds.monitoring.watchdog import Watchdog
from ilvr_ds.provenance import environment, machine
from ilvr_ds.tracking.mlflow_state import PARENT_TAG, read_state
from ilvr_ds.tracking.tracker import Tracker, TrackingTarget
from ilvr_ds.training.held_out import HeldOut
from ilvr_ds.training.inputs import Inputs, say_what_does_nothing, say_where_latents_are_new
from ilvr_ds.training.latent_views import LatentViews
from ilvr_ds.training.pictures import Pictures
from ilvr_ds.training.quarantine import Quarantine
from ilvr_ds.training.stage2 import StageTwoStep, TaughtStageTwoStep
from ilvr_ds.training.step import StageOneStep, TrainingStep
from ilvr_ds.training.trainer import Components

logger = logging.getLogger("ilvr_ds")
MAX_TYPES = 32


def assemble(recipe: Recipe, recipe_path: Path, inputs: Inputs | None = None) -> Components:
    """Build a run (collective), from `inputs` where they were read already. Raises UserError for everything that a
    person can mend."""
    inputs = inputs or Inputs.read(recipe, recipe_path, dist.world_size())
    shards, plan, file_settings = inputs.training, inputs.plan, inputs.file_settings
    checkpoint = find_checkpoint(recipe)
    initial = None if checkpoint else dist.decided_by_main(lambda: find_initial(recipe))
    parent = dist.decided_by_main(lambda: _mlflow_run(initial)) if initial else None
    source, name = checkpoint or initial, recipe.model.path
    folder = model_on_host(name, dist.decided_by_main(lambda: commit_of_base(source, name)))
    stored = replace(recipe, model=replace(recipe.model, path=folder))
    encoding = build_encoding(stored)
    world = dist.world_size()
    total = recipe.train.max_steps or recipe.train.epochs * plan.steps_per_epoch
    logger.info(
        "%d samples, %d a step on %s (%s), %d steps an epoch, %d samples left out of each epoch, %d steps in all",
        len(shards), plan.global_batch, counted(world, "rank"), dist.device().type, plan.steps_per_epoch,
        plan.remainder, total,
    )  # fmt: skip
    if dist.is_main():
        say_what_does_nothing(recipe, inputs, total)
        if not (checkpoint or initial):
            say_where_latents_are_new(stored)
    types = _types(shards)
    feature_sets = _StoredFeatures.of(stored, recipe_path, encoding)
    features = feature_sets.open(shards, "data.features") if feature_sets else None
    numbers = planned_numbers(recipe, plan, shards, inputs.are_measured)
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
    held_out = _held_out_dataset(recipe, encoding, types, inputs.held_out, feature_sets)
    zero_stage = int(file_settings.get("zero_optimization", {}).get("stage", 0))
    is_resharded = checkpoint is not None and needs_resharding(state, zero_stage)
    if checkpoint and is_resharded:
        reshard(checkpoint, state, zero_stage, recipe)
        file_settings = {**file_settings, "checkpoint": {"load_universal": True}}
    longest = shards.manifest.longest_tokens if inputs.are_measured else 0
    step, networks = build_step(stored, file_settings, encoding, initial, types, longest)
    if source is not None:  # another run's weights may be trained on with another tower
        kept = networks.frozen if checkpoint else {what: f for what, f in networks.frozen.items() if what == LAYERS}
        check_frozen_is_the_same(source, kept, folder)
    datasets, evaluation = {"training": shards}, None
    if held_out:
        datasets["evaluation"] = held_out[0].reader.shard_set
        evaluation = HeldOut(*held_out, step, _quarantine(recipe, datasets["evaluation"]))
    is_own = checkpoint is not None and is_of_run(recipe, checkpoint)
    run_id = state.get("mlflow_run_id") if is_own else None  # from another run's checkpoint this is a new run
    turns = dist.decided_by_main(lambda: is_another_way(recipe))
    if checkpoint:  # all is checked: now the run's folder may change
        dist.decided_by_main(lambda: leave_newer(recipe, checkpoint))
    tracker = _tracker(
        recipe, file_settings, datasets, parent,
        goes_on=is_own or (checkpoint is not None and not turns),
        back_to=state["loader"]["step"] if is_own and turns else None,
        run_id=run_id,
    )  # fmt: skip
    dist.decided_by_main(lambda: remember(recipe, checkpoint))
    save = recipe.checkpoint
    writer = CheckpointWriter(
        recipe.run_dir / "checkpoints", networks.student, networks.trained,
        step.teacher,
        save.keep_last, save.keep_every, save.background,
    )  # fmt: skip
    watchdog = Watchdog(
        recipe.run.rank_timeout_s, recipe.run.stall_timeout_s, lambda: tracker.close("FAILED", timeout_s=10)
    )
    return Components(
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
        rehearsal=_rehearsal(recipe, shards) if inputs.are_measured else None,
        checkpoint=checkpoint,
        is_resharded=is_resharded,
        networks=networks,
        base={"model_commit": commit_of(name, folder), "frozen": networks.frozen},
    )


def build_step(
    recipe: Recipe,
    file_settings: dict[str, Any],
    encoding: Encoding,
    initial: Path | None = None,
    types: tuple[str, ...] = (),
    longest: int = 0,
) -> tuple[TrainingStep, Networks]:
    """Student, tower (or what stands for it) and teacher, if any, ready to compute optimizer steps (collective).

    initial: the checkpoint whose weights the student starts from, where it is not `model.path`. types: the kinds of
    task by which losses are split. longest: tokens of the longest sample; 0: as long as any may be.
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
        networks.teacher,
        shards,
        networks.student_shards,
        recipe.selection,
        recipe.model.latent_size,
        _read_together(recipe, longest or recipe.data.max_tokens),
    )
    if not recipe.train.has_free_latents:
        return StageOneStep(networks.student, networks.vision, teacher, recipe.loss, types), networks
    size = recipe.model.latent_size
    return TaughtStageTwoStep(networks.student, networks.vision, teacher, recipe.loss, types, size), networks


def _read_together(recipe: Recipe, longest: int) -> int:
    """Micro-batches that the teacher reads at once: the same number on all ranks, whatever their samples.

    longest: tokens of the longest sample.
    """
    largest = recipe.train.micro_batch_tokens or recipe.train.micro_batch_size * longest
    return max(1, recipe.teacher.max_tokens // largest)


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
    """The longest samples, as many as a step has on a rank, which is what no real window exceeds; in micro-batches the
    first of which is as large as one can become. In a data set of fewer samples they come again."""
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
    recipe: Recipe,
    encoding: Encoding,
    types: tuple[str, ...],
    shards: ShardSet | None,
    stored: _StoredFeatures | None,
) -> tuple[WindowDataset, int, int, list[str]] | None:
    """The evaluation data, loader workers, the number of windows of each rank, and the kinds of task."""
    if shards is None:
        return None
    micro, world = recipe.train.micro_batch_size, dist.world_size()
    steps = min(recipe.evaluation.max_samples, len(shards)) // (micro * world)
    if steps == 0:
        raise UserError(
            f"data.eval_shards: {shards.location} and evaluation.max_samples leave no whole micro-batch of {micro} "
            f"samples for each of {counted(world, 'rank')}"
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
    return Pictures(tracker, recipe.run_dir, LatentViews(dataset, numbers, step))


def _quarantine(recipe: Recipe, shards: ShardSet) -> Quarantine:
    return Quarantine(recipe.run_dir, shards, recipe.data.max_bad_fraction, dist.is_main())


def _tracker(
    recipe: Recipe,
    file_settings: dict[str, Any],
    datasets: dict[str, ShardSet],
    parent: str | None,
    *,
    goes_on: bool,
    back_to: int | None,
    run_id: str | None,
) -> Tracker:
    """The run's record; on the main rank the resolved settings and where it runs are written beside it (collective).

    parent: MLflow's id of the run whose weights this one starts from. The rest: how the record begins (see Tracker).
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
        back_to=back_to,
        run_id=run_id,
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
