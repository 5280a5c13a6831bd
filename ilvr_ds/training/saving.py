"""A run's checkpoints: when one was begun, what became of it, and how a run goes on from one."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from ilvr_ds import dist
from ilvr_ds.checkpoint.load import load_checkpoint
from ilvr_ds.checkpoint.reshard import load_resharded, universal_form
from ilvr_ds.engine.optimizer import apply_settings
from ilvr_ds.errors import UserError
from ilvr_ds.training.components import Components

logger = logging.getLogger("ilvr_ds")


class Saver:
    """Saves the state of a run after a number of steps, each once, and records what became of it (collective)."""

    def __init__(self, parts: Components) -> None:
        self.parts = parts
        self.step = -1
        """Steps done at the newest checkpoint, whole or under way; -1: there is none."""

    def begin(self, done: int, is_last: bool = False) -> None:
        """Begin to save after `done` steps."""
        if done == self.step:
            return
        parts = self.parts
        parts.watchdog.at(done, "checkpoint")
        self.finish()
        state = {
            "loader": {**parts.loader.state_dict(), "step": done},
            "recipe": parts.recipe.to_dict(),
            "zero_stage": parts.networks.zero_stage,
            "mlflow_run_id": parts.tracker.run_id,
            "quarantine": parts.quarantine.state_dict(),
            **parts.base,
        }
        start = time.monotonic()
        with parts.speed.paused(), parts.step.phases("checkpoint"):
            is_beside = parts.writer.start(done, state)
        self.step = done
        parts.tracker.log(done, {"checkpoint/stall_seconds": time.monotonic() - start})
        if not is_beside:
            self.finish(is_last)

    def finish(self, is_last: bool = False) -> None:
        """Complete the checkpoint under way. One that could not be written is tried again when the next is due; the
        last one must be: raises UserError."""
        tracker = self.parts.tracker
        with self.parts.step.phases("checkpoint"):
            path, error = self.parts.writer.finish()
        if path is not None:
            tracker.event("checkpoint", step=self.step, path=str(path))
            tracker.log(self.step, {"checkpoint/saved": 1.0})
        if error is not None:
            failed, self.step = self.step, -1
            tracker.event("checkpoint_failed", step=failed, reason=error)
            tracker.log(failed, {"checkpoint/saved": 0.0})
            if is_last:
                raise UserError(f"the checkpoint after step {failed} could not be written: {error}")
            dist.warn("the checkpoint after step %d could not be written: %s; training goes on", failed, error)


def restore(parts: Components, checkpoint: Path) -> int:
    """Load the whole state of a run from `checkpoint` (collective); returns the steps done."""
    student, teacher, names = parts.step.student, parts.step.teacher, parts.networks.trained
    shards = teacher.shards if teacher is not None else None
    if parts.is_resharded:
        state = load_resharded(checkpoint, universal_form(parts.recipe), student, names, shards)
    else:
        state = load_checkpoint(checkpoint, student, names, shards)
    parts.networks.teach_frozen()  # they may be others than those at model.path (model.init_from)
    apply_settings(student, parts.recipe.optim)
    parts.loader.load_state_dict(state["loader"])
    parts.quarantine.load_state_dict(state["quarantine"])
    logger.info("going on from %s at step %d of %d", checkpoint, parts.loader.step, parts.total_steps)
    return parts.loader.step
