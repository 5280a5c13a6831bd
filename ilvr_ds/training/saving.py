"""A run's checkpoints: when one was begun, what became of it, and how a run goes on from one."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from ilvr_ds import dist
from ilvr_ds.checkpoint.best import best_checkpoint, name_again, read_best, write_best
from ilvr_ds.checkpoint.find import is_of_run
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
        self.is_under_way = False
        self.best: dict[str, Any] | None = None
        """The evaluation whose checkpoint will be the best when it is whole"""

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
            "layout": parts.networks.layout.settings,
            "mlflow_run_id": parts.tracker.run_id,
            "quarantine": parts.quarantine.state_dict(),
            "best": parts.best.state_dict(),
            **parts.base,
        }
        start = time.monotonic()
        with parts.speed.paused(), parts.step.phases("checkpoint"):
            is_beside = parts.writer.start(done, state)
        self.step, self.is_under_way = done, True
        parts.tracker.log(done, {"checkpoint/stall_seconds": time.monotonic() - start})
        if not is_beside:
            self.finish(is_last)

    def keep_best(self, best: dict[str, Any]) -> None:
        """Save after this evaluation, unless that was done, and keep that checkpoint as the best."""
        if best["step"] != self.step:
            self.finish()  # the one before may be the best so far
        self.best = best
        self.begin(best["step"])
        if not self.is_under_way and self.step == best["step"]:
            self._name_best()

    def _name_best(self) -> None:
        """Name the newest checkpoint as the best if it is: the one before may now be deleted as others are."""
        best, folder = self.best, self.parts.writer.folder
        if best is None or best["step"] != self.step:
            return
        self.best = None
        if dist.is_main():
            try:
                write_best(folder, best)
            except OSError as error:
                logger.warning("%s: the best checkpoint, after step %d, is not named: %s", folder, self.step, error)

    def finish(self, is_last: bool = False) -> None:
        """Complete the checkpoint under way. One that could not be written is tried again when the next is due; the
        last one must be: raises UserError."""
        tracker = self.parts.tracker
        with self.parts.step.phases("checkpoint"):
            path, error = self.parts.writer.finish()
        self.is_under_way = False
        if path is not None:
            self._name_best()
            tracker.event("checkpoint", step=self.step, path=str(path))
            tracker.log(self.step, {"checkpoint/saved": 1.0})
        if error is not None:
            failed, self.step = self.step, -1
            if self.best is not None and self.best["step"] == failed:
                kept = _kept_best(self.parts.writer.folder)
                if self.parts.best.found == self.best:  # and no later evaluation, which is about to be saved
                    self.parts.best.lose(kept)
                self.best = None
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
    if is_of_run(parts.recipe, checkpoint):
        on_disk = dist.decided_by_main(lambda: read_best(checkpoint.parent))
        recorded = dist.decided_by_main(parts.tracker.evaluations)
        parts.best.load(state.get("best"), on_disk, parts.loader.step, recorded)
        if (best := parts.best.found) is not None:
            dist.decided_by_main(lambda: name_again(checkpoint.parent, best))
            if (kept := _kept_best(checkpoint.parent)) is None or kept["step"] != best["step"]:
                parts.best.lose(kept)
    logger.info("going on from %s at step %d of %d", checkpoint, parts.loader.step, parts.total_steps)
    return parts.loader.step


def _kept_best(folder: Path) -> dict[str, Any] | None:
    """The best evaluation that has a checkpoint (collective)."""
    return dist.decided_by_main(lambda: read_best(folder) if best_checkpoint(folder) else None)
