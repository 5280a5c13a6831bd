"""The loop of a training run: it knows *when* things happen; step.py knows *how* a step is computed."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ilvr_ds import dist
from ilvr_ds.config import Recipe
from ilvr_ds.data.loader import WindowLoader
from ilvr_ds.data.window import BadSample, Window
from ilvr_ds.errors import UserError
from ilvr_ds.training.checkpoint import load_checkpoint, remove_old, save_checkpoint
from ilvr_ds.training.evaluation import HeldOut
from ilvr_ds.training.monitors import MemoryMonitor, PhaseTimer, Progress, StopSignal, Throughput
from ilvr_ds.training.quarantine import Quarantine
from ilvr_ds.training.schedule import learning_rate
from ilvr_ds.training.step import SUMS, StageOneStep, step_metrics
from ilvr_ds.training.totals import Totals
from ilvr_ds.training.tracking import Tracker

logger = logging.getLogger("ilvr_ds")


@dataclass
class Parts:
    """What a run is put together from (assembly.py does it)."""

    recipe: Recipe
    loader: WindowLoader
    step: StageOneStep
    trained: list[str]
    held_out: HeldOut | None
    tracker: Tracker
    total_steps: int
    longest_sample: int | None
    """Number of the longest training sample, where the data set knows its lengths."""
    quarantine: Quarantine
    """Training samples that could not be used."""
    checkpoint: Path | None = None
    """Where to go on from."""


class Trainer:
    """Runs stage 1 from the first or the restored step to the last."""

    def __init__(self, parts: Parts) -> None:
        self.recipe = parts.recipe
        self.parts = parts
        self.loader, self.step, self.tracker = parts.loader, parts.step, parts.tracker
        self.quarantine = parts.quarantine
        self.student, self.teacher = parts.step.student, parts.step.teacher
        self.totals = Totals([*SUMS, "drift", "weight"], dist.device())
        self.speed, self.memory, self.phases = Throughput(), MemoryMonitor(), PhaseTimer()
        self.progress = Progress(parts.total_steps, dist.is_main())
        self.signal = StopSignal()
        self.reading: tuple[tuple[BadSample, ...], int] = ((), 0)
        """Bad samples and retries of this rank's last window."""
        self.done = 0
        self.saved_step = -1

    def fit(self) -> bool:
        """Train and save; True when the last step was done, False when a signal asked to stop before."""
        self._restore()
        if self.done >= self.parts.total_steps:
            self.progress.close()
            logger.info("nothing to do: step %d of %d is done", self.done, self.parts.total_steps)
            return True
        self._rehearse()
        with self.signal:
            for step, window in self.loader.windows(self.parts.total_steps):
                self._train_step(step, window)
                self.done = step + 1
                if self._after_step(self.done):
                    break
        self._save(self.done)
        finished = self.done == self.parts.total_steps
        if finished:
            self._evaluate(self.done)
        self.progress.close()
        return finished

    def _train_step(self, step: int, window: Window) -> None:
        """One optimizer step: targets once, every micro-batch forward and backward, update, the teacher follows."""
        for group in self.student.optimizer.param_groups:
            group["lr"] = learning_rate(self.recipe.optim, step, self.parts.total_steps)
        with self.phases("teacher"):
            prepared = self.step.prepare(window.to(dist.device()))
        for micro in prepared.window.micro_batches:
            with self.phases("student"):
                loss = self.step.loss(micro, prepared, step, self.totals)
                # DeepSpeed averages gradients over ranks; ours are parts of one sum
                self.student.backward(loss * dist.world_size(), scale_wrt_gas=False)
            with self.phases("optimizer"):
                self.student.step()
        with self.phases("momentum"):
            difference, weight = self.teacher.follow().unbind()
        self.totals.add({"drift": difference, "weight": weight})
        self.reading = (window.bad, window.retries)
        self.speed.add(samples=len(window.tokens.real), tokens=window.num_tokens, padding=window.num_padding)

    def _after_step(self, done: int) -> bool:
        """What is due after `done` steps: log, evaluate, save; True when some rank was asked to stop."""
        every = self.recipe
        stop = self._agree()
        last = done == self.parts.total_steps or self.quarantine.exceeded
        if done % every.tracking.every_steps == 0 or last:
            self._log(done)
        if every.evaluation.every_steps and done % every.evaluation.every_steps == 0 and done < self.parts.total_steps:
            self._evaluate(done)
        if every.checkpoint.every_steps and done % every.checkpoint.every_steps == 0 and done < self.parts.total_steps:
            self._save(done)
        if self.quarantine.exceeded and self.quarantine.max_fraction:  # at 0 no step without a sample is kept
            self._save(done)
        self.quarantine.check()
        return stop

    def _agree(self) -> bool:
        """Tell all ranks what this one has met in the step; True when some rank was asked to stop."""
        ranks = dist.gather_on_host((self.signal.requested, *self.reading))
        bad = [sample for _, samples, _ in ranks for sample in samples]
        self.quarantine.add(bad, self.loader.global_batch, sum(retries for _, _, retries in ranks))
        return any(requested for requested, _, _ in ranks)

    def _log(self, done: int) -> None:
        metrics = step_metrics(self.totals.take(), self.recipe.loss)
        metrics["lr"] = learning_rate(self.recipe.optim, done - 1, self.parts.total_steps)
        metrics["grad/norm"] = float(self.student.get_global_grad_norm() or 0.0)
        metrics["optimizer/skipped_steps"] = float(self.student.skipped_steps)
        metrics["teacher/momentum"] = self.recipe.teacher.momentum
        metrics |= self.quarantine.metrics()
        metrics["epoch"] = done / self.loader.steps_per_epoch
        metrics |= self.speed.take(dist.world_size()) | self.memory.take() | self.phases.take()
        self.tracker.log(done, metrics)
        self.progress.update(done, metrics)

    def _evaluate(self, done: int) -> None:
        if self.parts.held_out is None:
            return
        with self.speed.paused():
            metrics = self.parts.held_out()
        self.tracker.log(done, metrics)
        logger.info("step %d  %s", done, "  ".join(f"{name} {value:.4g}" for name, value in metrics.items()))

    def _save(self, done: int) -> None:
        """Save after `done` steps, once."""
        if done == self.saved_step:
            return
        folder = self.recipe.run_dir / "checkpoints"
        state = {
            "loader": {**self.loader.state_dict(), "step": done},
            "recipe": self.recipe.to_dict(),
            "mlflow_run_id": self.tracker.run_id,
            "quarantine": self.quarantine.state_dict(),
        }
        with self.speed.paused():
            path = save_checkpoint(folder, done, self.student, self.parts.trained, self.teacher.shards, state)
            remove_old(folder, self.recipe.checkpoint.keep_last)
        self.saved_step = done
        self.tracker.event("checkpoint", step=done, path=str(path))

    def _restore(self) -> None:
        if self.parts.checkpoint is None:
            return
        state = load_checkpoint(self.parts.checkpoint, self.student, self.parts.trained, self.teacher.shards)
        self.loader.load_state_dict(state["loader"])
        self.quarantine.load_state_dict(state["quarantine"])
        self.done = self.saved_step = self.loader.step
        logger.info("going on from %s at step %d of %d", self.parts.checkpoint, self.done, self.parts.total_steps)

    def _rehearse(self) -> None:
        """Forward and backward of the longest sample, repeated to a whole window, at weight 0.

        Out-of-memory shows in the first minute, not after hours; a gradient of zeros changes nothing.
        """
        if self.parts.longest_sample is None:
            logger.info("sample lengths are not in the data set: no rehearsal (pack with --config to have one)")
            return
        train = self.recipe.train
        numbers = np.full(train.micro_batch_size * train.grad_accum_steps, self.parts.longest_sample)
        window = self.loader.dataset.window(numbers).to(dist.device())
        if window.bad:
            logger.warning("the longest sample is not rehearsed: %s", window.bad[0].reason)
        prepared = self.step.prepare(window)
        unused = Totals(SUMS, dist.device())
        loss: Any = self.step.loss(prepared.window.micro_batches[0], prepared, 0, unused)
        total = float(dist.sum_over_ranks(loss.detach().clone()))  # on all ranks, so that all go the same way
        if not math.isfinite(total):
            raise UserError(f"model.path: the loss of the longest sample is {total}: the weights are not usable")
        self.student.backward(0.0 * loss, scale_wrt_gas=False)
        logger.info("rehearsed the longest sample: %d tokens, %s", window.tokens.real.shape[1], self.memory.summary())
