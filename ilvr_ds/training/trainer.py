"""The loop of a training run: it knows *when* things happen; step.py knows *how* a step is computed."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ilvr_ds import dist
from ilvr_ds.checkpoint.find import is_of_run
from ilvr_ds.checkpoint.load import load_checkpoint
from ilvr_ds.checkpoint.reshard import load_resharded
from ilvr_ds.checkpoint.writer import CheckpointWriter
from ilvr_ds.config import Recipe
from ilvr_ds.data.loader import WindowLoader
from ilvr_ds.data.window import BadSample, Window
from ilvr_ds.engine.networks import Networks, apply_settings
from ilvr_ds.engine.schedule import learning_rate
from ilvr_ds.errors import RunError, UserError
from ilvr_ds.monitoring.monitors import (
    MemoryMonitor,
    NodeMonitor,
    Progress,
    StopSignal,
    of_all_ranks,
)
from ilvr_ds.monitoring.phases import shares
from ilvr_ds.monitoring.throughput import Throughput
from ilvr_ds.monitoring.watchdog import Watchdog
from ilvr_ds.monitoring.work import work_of
from ilvr_ds.tracking.tracker import Tracker
from ilvr_ds.training.held_out import HeldOut
from ilvr_ds.training.metric_sums import MetricSums
from ilvr_ds.training.pictures import Pictures
from ilvr_ds.training.quarantine import Quarantine
from ilvr_ds.training.step import TrainingStep

logger = logging.getLogger("ilvr_ds")


@dataclass
class Components:
    """What a run is put together from (assembly.py does it)."""

    recipe: Recipe
    loader: WindowLoader
    step: TrainingStep
    trained: list[str]
    zero_stage: int
    held_out: HeldOut | None
    tracker: Tracker
    pictures: Pictures
    writer: CheckpointWriter
    watchdog: Watchdog
    speed: Throughput
    total_steps: int
    rehearsal: list[NDArray[np.int64]] | None
    """The longest training samples as the micro-batches of a step, where the data set knows its lengths."""
    quarantine: Quarantine
    """Training samples that could not be used."""
    checkpoint: Path | None = None
    """Where to go on from."""
    is_resharded: bool = False
    """The checkpoint was saved by another number of ranks, or under another ZeRO stage."""
    networks: Networks | None = None
    """Those of `step`; none where nothing is ever restored."""
    base: dict[str, Any] = field(default_factory=dict)
    """For checkpoints: which frozen weights, in none of them, the trained ones stand on."""


class Trainer:
    """Runs a stage from the first or the restored step to the last."""

    def __init__(self, parts: Components) -> None:
        self.recipe = parts.recipe
        self.parts = parts
        self.loader, self.step, self.tracker = parts.loader, parts.step, parts.tracker
        self.quarantine = parts.quarantine
        self.student, self.teacher = parts.step.student, parts.step.teacher
        self.totals = MetricSums(parts.step.sums, dist.device())
        self.speed, self.memory, self.phases = parts.speed, MemoryMonitor(), parts.step.phases
        self.node = NodeMonitor()
        self.progress = Progress(parts.total_steps, dist.is_main())
        self.signal = StopSignal()
        self.writer, self.watchdog = parts.writer, parts.watchdog
        self.reading: tuple[tuple[BadSample, ...], int] = ((), 0)
        """Bad samples and retries of this rank's last window."""
        self.done = 0
        self.saved_step = -1
        self.skipped_in_a_row = 0

    def fit(self) -> bool:
        """Train and save; True when all was done, False when a signal asked to stop before."""
        self._restore()
        is_trained = self.done >= self.parts.total_steps
        due = self._left_undone()
        if is_trained and not due:
            self.progress.close()
            logger.info("nothing to do: step %d of %d is done", self.done, self.parts.total_steps)
            return True
        if not is_trained:
            self._rehearse()
        self._look(self.done, due)
        is_finished = is_trained or self._train()
        self.parts.pictures.finish()
        self.progress.close()
        return is_finished

    def _train(self) -> bool:
        """The steps that are left, and what is due behind the last one."""
        stop = False
        self.speed.start()
        self.phases.start()
        self.progress.begin(self.done)
        with self.signal:
            for step, window in self.phases.around("data", self.loader.windows(self.parts.total_steps)):
                self._train_step(step, window)
                self.done = step + 1
                if stop := self._after_step(self.done):
                    break
            self._save(self.done, is_last=True)
            self._finish_saving(is_last=True)
        if self.done < self.parts.total_steps:
            return False
        due = self._due(self.done)
        if not stop:
            self._look(self.done, due)
        return not (stop and due)

    def _train_step(self, step: int, window: Window) -> None:
        """One optimizer step: targets once, every micro-batch forward and backward, update, and the teacher is due."""
        totals, skipped = self.totals.values.clone(), self.student.skipped_steps
        losses = []
        for group in self.student.optimizer.param_groups:
            group["lr"] = learning_rate(self.recipe.optim, step, self.parts.total_steps)
        work = work_of(window)
        self.watchdog.at(step, "prepare", window.ids)
        prepared = self.step.prepare(window.to(dist.device()))
        for micro in prepared.window.micro_batches:
            # not counted by DeepSpeed: filled by tokens, steps have more micro-batches or fewer
            self.student.set_gradient_accumulation_boundary(micro is prepared.window.micro_batches[-1])
            self.watchdog.at(step, "student", micro.ids)
            with self.phases("forward"):
                loss = self.step.loss(micro, prepared, step, self.totals)
            with self.phases("backward"):  # DeepSpeed averages gradients over ranks; ours are parts of one sum
                self.student.backward(loss * dist.world_size(), scale_wrt_gas=False)
            losses.append(loss.detach())
            del loss  # and what its graph still holds, before the next forward
            self.watchdog.at(step, "optimizer", window.ids)
            with self.phases("optimizer"):
                self.student.step()
        if self.student.skipped_steps > skipped:
            self.totals.values.copy_(totals)
            self._note_skipped(step, losses, window)
        else:
            self.skipped_in_a_row = 0
            if self.teacher is not None:
                self.teacher.mark_stale()
        self.watchdog.at(step, "next samples")
        self.reading = (window.bad, window.retries)
        self.speed.add(work, window.num_padding)

    def _after_step(self, done: int) -> bool:
        """What is due after `done` steps: log, evaluate, save; True when some rank was asked to stop."""
        every = self.recipe
        stop = self._agree()
        last = done == self.parts.total_steps or self.quarantine.exceeded or stop
        if done % every.tracking.every_steps == 0 or last:
            self._log(done)
        if done < self.parts.total_steps and not stop:  # who asks to stop may not wait long: the next start does it
            self._look(done, self._due(done))
        if every.checkpoint.every_steps and done % every.checkpoint.every_steps == 0 and done < self.parts.total_steps:
            self._save(done)
        if self.quarantine.exceeded:
            if self.quarantine.max_fraction:  # at 0 no step without a sample is kept
                self._save(done)
            self._finish_saving()
        self.quarantine.check()
        return stop

    def _agree(self) -> bool:
        """Tell all ranks what this one has met in the step; True when some rank was asked to stop."""
        ranks = dist.gather_on_host((self.signal.requested, self.writer.is_written, *self.reading))
        if all(is_written for _, is_written, _, _ in ranks):
            self._finish_saving()
        bad = [sample for _, _, samples, _ in ranks for sample in samples]
        self.quarantine.add(bad, self.loader.global_batch, sum(retries for *_, retries in ranks))
        return any(is_asked for is_asked, *_ in ranks)

    @contextmanager
    def _away(self, phase: str) -> Iterator[None]:
        """Time that counts for no rate."""
        with self.speed.paused(), self.phases(phase):
            yield

    def _note_skipped(self, step: int, losses: list[Any], window: Window) -> None:
        """A step whose gradients were not finite changed nothing; too many in a row end the run. Same on all ranks."""
        self.skipped_in_a_row += 1
        # reading losses waits for the device, which a skipped step may
        bad = [micro.ids for micro, loss in zip(window.micro_batches, losses, strict=True) if not loss.isfinite()]
        for ids in bad:
            logger.warning("step %d: the loss is not finite; samples %s", step + 1, ", ".join(ids))
        dist.warn("step %d: the gradients are not finite; the step is skipped", step + 1)
        self.tracker.event("skipped_step", step=step + 1)
        if self.skipped_in_a_row >= self.recipe.train.max_skipped_steps:
            self._finish_saving()
            named = sorted(set(sum(dist.gather_on_host(sum(bad, ())), ())))
            where = f"; losses that are not finite: samples {', '.join(named)}" if named else ""
            raise RunError(
                f"step {step + 1}: the gradients were not finite in {self.skipped_in_a_row} steps in a row "
                f"(train.max_skipped_steps){where}; go on from the last checkpoint with a lower optim.lr"
            )

    def _log(self, done: int) -> None:
        if self.teacher is not None:
            self.watchdog.at(done - 1, "momentum")
            with self.phases("momentum"):
                difference, weight = self.teacher.take_drift().unbind()
            self.watchdog.at(done - 1, "next samples")
            self.totals.add({"drift": difference, "weight": weight})
        metrics = self.step.metrics(self.totals.take())
        metrics["lr"] = learning_rate(self.recipe.optim, done - 1, self.parts.total_steps)
        metrics["grad/norm"] = float(self.student.get_global_grad_norm() or 0.0)
        metrics["optimizer/skipped_steps"] = float(self.student.skipped_steps)
        metrics |= self.quarantine.metrics()
        metrics["epoch"] = done / self.loader.steps_per_epoch
        metrics |= self.speed.take() | shares(dist.gather_on_host(self.phases.take()))
        metrics |= of_all_ranks(self.memory.take(), self.node.take())
        self.tracker.log(done, metrics)
        self.progress.update(done, metrics)

    def _due(self, done: int) -> set[str]:
        """Which of "evaluation" and "pictures" are due after `done` steps."""
        recipe, is_last = self.recipe, done == self.parts.total_steps
        evaluation, pictures = recipe.evaluation.every_steps, recipe.tracking.pictures_every_steps
        due = set()
        if self.parts.held_out and done and (is_last or (evaluation and done % evaluation == 0)):
            due.add("evaluation")
        if recipe.tracking.picture_samples and (not done or is_last or (pictures and done % pictures == 0)):
            due.add("pictures")
        return due

    def _left_undone(self) -> set[str]:
        """What is due where this start begins: all of it in a new run, and in one that was killed in it, or told to
        stop before, what its record does not hold."""
        path = self.parts.checkpoint
        if path is None:
            return self._due(0)
        if not is_of_run(self.recipe, path):
            return set()
        return self._due(self.done) - dist.decided_by_main(lambda: self.tracker.looks(self.done))

    def _look(self, done: int, due: set[str]) -> None:
        if "evaluation" in due:
            self._evaluate(done)
        if "pictures" in due:
            self._draw(done)

    def _evaluate(self, done: int) -> None:
        if self.parts.held_out is None:
            return
        try:
            with self._away("evaluation"):
                metrics = self.parts.held_out()
        except (
            UserError
        ):  # on all ranks: too many held-out samples cannot be read, which spoils nothing that was learnt
            self._save(done)
            self._finish_saving()
            raise
        self.tracker.log(done, metrics)
        logger.info("step %d  %s", done, "  ".join(f"{name} {value:.4g}" for name, value in metrics.items()))

    def _draw(self, done: int) -> None:
        self.watchdog.at(done, "pictures")
        with self._away("pictures"):
            self.parts.pictures(done)

    def _save(self, done: int, is_last: bool = False) -> None:
        """Begin to save after `done` steps, once."""
        if done == self.saved_step:
            return
        self.watchdog.at(done, "checkpoint")
        self._finish_saving()
        state = {
            "loader": {**self.loader.state_dict(), "step": done},
            "recipe": self.recipe.to_dict(),
            "zero_stage": self.parts.zero_stage,
            "mlflow_run_id": self.tracker.run_id,
            "quarantine": self.quarantine.state_dict(),
            **self.parts.base,
        }
        start = time.monotonic()
        with self._away("checkpoint"):
            is_beside = self.writer.start(done, state)
        self.saved_step = done
        self.tracker.log(done, {"checkpoint/stall_seconds": time.monotonic() - start})
        if not is_beside:
            self._finish_saving(is_last)

    def _finish_saving(self, is_last: bool = False) -> None:
        """Make the checkpoint under way whole. One that could not be written is tried again when the next is due; the
        last one must be."""
        with self.phases("checkpoint"):
            path, error = self.writer.finish()
        if path is not None:
            self.tracker.event("checkpoint", step=self.saved_step, path=str(path))
            self.tracker.log(self.saved_step, {"checkpoint/saved": 1.0})
        if error is not None:
            failed, self.saved_step = self.saved_step, -1
            self.tracker.event("checkpoint_failed", step=failed, reason=error)
            self.tracker.log(failed, {"checkpoint/saved": 0.0})
            if is_last:
                raise UserError(f"the checkpoint after step {failed} could not be written: {error}")
            dist.warn("the checkpoint after step %d could not be written: %s; training goes on", failed, error)

    def _restore(self) -> None:
        if self.parts.checkpoint is None:
            return
        load = load_resharded if self.parts.is_resharded else load_checkpoint
        shards = self.teacher.shards if self.teacher is not None else None
        state = load(self.parts.checkpoint, self.student, self.parts.trained, shards)
        assert self.parts.networks is not None
        self.parts.networks.teach_frozen()  # they may be others than those at model.path (model.init_from)
        apply_settings(self.student, self.recipe.optim)
        self.loader.load_state_dict(state["loader"])
        self.quarantine.load_state_dict(state["quarantine"])
        self.done = self.saved_step = self.loader.step
        logger.info("going on from %s at step %d of %d", self.parts.checkpoint, self.done, self.parts.total_steps)

    def _rehearse(self) -> None:
        """Targets of a window of the longest samples, forward and backward of its first micro-batch, at weight 0.

        Out-of-memory shows in the first minute, not after hours; a gradient of zeros changes nothing.
        """
        if self.parts.rehearsal is None:
            logger.info("sample lengths are not in the data set: no rehearsal (pack with --config to have one)")
            return
        window = self.loader.dataset.window(self.parts.rehearsal).to(dist.device())
        if window.bad:
            logger.warning("one of the longest samples is not rehearsed: %s", window.bad[0].reason)
        prepared = self.step.prepare(window)
        unused = MetricSums(self.step.sums, dist.device())
        loss: Any = self.step.loss(prepared.window.micro_batches[0], prepared, 0, unused)
        total = float(dist.sum_over_ranks(loss.detach().clone()))  # on all ranks, so that all go the same way
        if not math.isfinite(total):
            raise UserError(f"model.path: the loss of the longest samples is {total}: the weights are not usable")
        self.student.backward(0.0 * loss, scale_wrt_gas=False)
        logger.info(
            "rehearsed the longest samples: %d tokens, in all %d of a step, %s",
            max(window.tokens.lengths), window.num_tokens, self.memory.summary(),
        )  # fmt: skip
