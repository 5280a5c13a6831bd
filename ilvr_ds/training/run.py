"""One training run from start to end, on this rank."""

from __future__ import annotations

import logging
from pathlib import Path

from ilvr_ds import dist
from ilvr_ds.config import Recipe
from ilvr_ds.engine.networks import init_process_group
from ilvr_ds.errors import RunError, UserError
from ilvr_ds.monitoring.run_lock import run_lock
from ilvr_ds.tracking.record import summary_lines
from ilvr_ds.tracking.tracker import Status
from ilvr_ds.training.assembly import assemble
from ilvr_ds.training.assembly.alike import check_alike
from ilvr_ds.training.assembly.inputs import Inputs
from ilvr_ds.training.shares import share_lines
from ilvr_ds.training.trainer import Trainer

logger = logging.getLogger("ilvr_ds")
PATIENCE_S = 60.0
"""Collectives time out this much later than the watchdog, which can name the rank that is lost."""


def train(recipe: Recipe, recipe_path: Path) -> int:
    """Train; returns the exit code: `run.stop_exit_code` when a signal asked to stop and a checkpoint was saved.

    Raises RunError, with the rank's step and samples, for whatever keeps the run from going on; UserError, before
    anything is written, where another process trains it.
    """
    inputs = Inputs.read(recipe, recipe_path, dist.enter().world_size)  # before anything compiles
    init_process_group(recipe.run.stall_timeout_s + PATIENCE_S)
    check_alike(recipe, inputs)
    with run_lock(recipe.run_dir):
        status = _train(recipe, recipe_path, inputs)
        dist.barrier()  # a scheduler that sees the exit code of one rank may kill the others: leave together
    dist.close()
    return recipe.run.stop_exit_code if status == "KILLED" else 0


def _train(recipe: Recipe, recipe_path: Path, inputs: Inputs) -> Status:
    parts = assemble(recipe, recipe_path, inputs)
    status: Status = "FAILED"
    try:
        trainer = Trainer(parts)
        status = "FINISHED" if trainer.fit() else "KILLED"
        parts.watchdog.stop()
    except (UserError, RunError):
        parts.watchdog.leave()
        raise  # as every rank does
    except Exception as error:
        logger.exception("this rank cannot go on")
        raise RunError(parts.watchdog.explain(error)) from error
    finally:
        parts.quarantine.close()
        parts.tracker.close(status)
    if dist.is_main():
        for line in summary_lines(recipe.run_dir / "metrics.jsonl"):
            logger.info(line)
        for line in share_lines(parts.loader.plan, parts.step.sets, trainer.done):
            logger.info("of the mixture: %s", line)
        if best := parts.best.summary():
            logger.info("%s: ilvr-ds export %s --best --to FOLDER", best, recipe.run_dir)
        logger.info("%s; record and checkpoints: %s", _WORDS[status], recipe.run_dir)
        logger.info("look at it: %s", parts.tracker.how_to_look())
    return status


_WORDS = {"FINISHED": "finished", "KILLED": "stopped by a signal, checkpoint saved"}
