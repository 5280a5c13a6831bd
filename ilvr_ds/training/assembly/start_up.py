"""The order in which a run comes to life. Everything is checked before weights load."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from ilvr_ds import dist
from ilvr_ds.base_model import commit_of
from ilvr_ds.checkpoint.writer import CheckpointWriter
from ilvr_ds.config import Recipe
from ilvr_ds.engine.networks import Networks
from ilvr_ds.errors import counted
from ilvr_ds.model.encoding import build_encoding
from ilvr_ds.monitoring.throughput import Throughput, model_flops, peak_flops
from ilvr_ds.monitoring.watchdog import Watchdog
from ilvr_ds.tracking.tracker import Tracker
from ilvr_ds.training.assembly.data import build_held_out, build_loader, build_pictures, open_data
from ilvr_ds.training.assembly.inputs import Inputs, say_what_does_nothing, say_where_latents_are_new
from ilvr_ds.training.assembly.longest import longest_samples
from ilvr_ds.training.assembly.record import open_tracker
from ilvr_ds.training.assembly.start import Start
from ilvr_ds.training.assembly.step import build_step
from ilvr_ds.training.best import Best
from ilvr_ds.training.components import Components
from ilvr_ds.training.quarantines import Quarantines
from ilvr_ds.training.shares import share_lines
from ilvr_ds.training.step import TrainingStep

logger = logging.getLogger("ilvr_ds")


def assemble(recipe: Recipe, recipe_path: Path, inputs: Inputs | None = None) -> Components:
    """Build a run (collective), from `inputs` where they were read already.

    Raises UserError for everything that a person can mend.
    """
    inputs = inputs or Inputs.read(recipe, recipe_path, dist.world_size())
    start = Start.find(recipe)
    local = start.on_this_host(recipe)
    total_steps = recipe.train.max_steps or recipe.train.epochs * inputs.plan.steps_per_epoch
    _announce(local, inputs, start, total_steps)
    encoding = build_encoding(local)
    data = open_data(local, recipe_path, inputs, encoding)
    loader = build_loader(recipe, inputs, data.training, start.state.get("loader"))
    settings = start.prepare_checkpoint(recipe, inputs.file_settings)
    step, networks = build_step(
        local, settings, encoding, start.initial, data.types, inputs.longest, inputs.training.named
    )
    start.check_frozen(networks.frozen)
    held_out = build_held_out(recipe, inputs, encoding, data, step, networks)
    tracker = open_tracker(recipe, settings, inputs, start)
    return Components(
        recipe=recipe,
        loader=loader,
        step=step,
        networks=networks,
        held_out=held_out,
        tracker=tracker,
        pictures=build_pictures(recipe, inputs, encoding, data, step, tracker),
        writer=_writer(recipe, networks, step),
        watchdog=_watchdog(recipe, tracker),
        speed=_throughput(networks, encoding.model_config, step),
        quarantine=Quarantines.of(recipe, inputs.training),
        total_steps=total_steps,
        rehearsal=longest_samples(recipe.train, inputs.lengths) if inputs.are_measured else None,
        checkpoint=start.checkpoint,
        is_resharded=start.is_resharded(networks.layout),
        best=Best(recipe.checkpoint.keep_best, recipe.train.patience, _evaluated_on(recipe, inputs)),
        base={"model_commit": commit_of(recipe.model.path, start.model_folder), "frozen": networks.frozen},
    )


def _announce(local: Recipe, inputs: Inputs, start: Start, total_steps: int) -> None:
    """Log how long the run is, and on the main rank what of its recipe has no effect."""
    plan, ranks, names = inputs.plan, counted(dist.world_size(), "rank"), inputs.training.named
    logger.info(
        "%d samples, %d a step on %s (%s), %s an epoch, %d samples left %s, %s in all",
        len(inputs.training), plan.global_batch, ranks, dist.device().type, counted(plan.steps_per_epoch, "step"),
        plan.remainder,
        "by each for the next" if names else "out of each epoch", counted(total_steps, "step"),
    )  # fmt: skip
    for line in share_lines(plan, names, total_steps):
        logger.info("mixture: %s", line)
    if dist.is_main():
        say_what_does_nothing(local, inputs, total_steps)
        if start.source is None:
            say_where_latents_are_new(local)


def _evaluated_on(recipe: Recipe, inputs: Inputs) -> str:
    """The held-out samples, which a run that goes on may change; how many of the last are cut off does not count."""
    if inputs.held_out is None:
        return ""
    most = recipe.evaluation.max_samples
    rule = " evenly" if any(most < len(shards) for shards in inputs.held_out.sets) else ""  # before, the first ones
    return f"{inputs.held_out.fingerprint}, {most}{rule}"


def _writer(recipe: Recipe, networks: Networks, step: TrainingStep) -> CheckpointWriter:
    folder, save = recipe.run_dir / "checkpoints", recipe.checkpoint
    return CheckpointWriter(
        folder, networks.student, networks.trained, step.teacher, save.keep_last, save.keep_every, save.background
    )


def _watchdog(recipe: Recipe, tracker: Tracker) -> Watchdog:
    run = recipe.run
    return Watchdog(run.rank_timeout_s, run.stall_timeout_s, lambda: tracker.close("FAILED", timeout_s=10))


def _throughput(networks: Networks, model_config: Any, step: TrainingStep) -> Throughput:
    flops = model_flops(networks.student.module, model_config, step.teacher is not None)
    return Throughput(flops, peak_flops(dist.device()))
