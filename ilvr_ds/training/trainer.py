"""The loop of a training run. It knows *when* things happen; a step (stage1.py, stage2.py) knows *how*."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from ilvr_ds import dist
from ilvr_ds.checkpoint.find import is_of_run
from ilvr_ds.data.window import BadSample, MicroBatch, Window
from ilvr_ds.engine.schedule import learning_rate
from ilvr_ds.errors import UserError
from ilvr_ds.monitoring.memory import MemoryMonitor
from ilvr_ds.monitoring.metric_sums import MetricSums
from ilvr_ds.monitoring.node_load import NodeMonitor, of_all_ranks
from ilvr_ds.monitoring.phases import shares
from ilvr_ds.monitoring.progress import Progress
from ilvr_ds.monitoring.stop_signal import StopSignal
from ilvr_ds.monitoring.work import work_of
from ilvr_ds.training.components import Components
from ilvr_ds.training.saving import Saver, restore
from ilvr_ds.training.shares import seen_by_set
from ilvr_ds.training.skipped_steps import SkippedSteps

logger = logging.getLogger("ilvr_ds")


class Trainer:
    """Runs a stage from the first or the restored step to the last."""

    def __init__(self, parts: Components) -> None:
        self.parts, self.recipe, self.total_steps = parts, parts.recipe, parts.total_steps
        self.loader, self.step, self.tracker = parts.loader, parts.step, parts.tracker
        self.quarantine, self.watchdog = parts.quarantine, parts.watchdog
        self.student, self.teacher = parts.step.student, parts.step.teacher
        self.totals = MetricSums(parts.step.sums, dist.device())
        self.speed, self.memory, self.phases = parts.speed, MemoryMonitor(), parts.step.phases
        self.node = NodeMonitor()
        self.progress = Progress(parts.total_steps, dist.is_main())
        self.signal = StopSignal()
        self.saver = Saver(parts)
        self.skipped = SkippedSteps(parts.tracker, self.saver, parts.recipe.train.max_skipped_steps)
        self.reading: tuple[tuple[BadSample, ...], int] = ((), 0)
        """Bad samples and retries of this rank's last window."""
        self.done = 0
        """Optimizer steps done."""
        self.logged = 0
        """Those at the last log line."""

    def fit(self) -> bool:
        """Train and save; True when all was done, False when a signal asked to stop before."""
        self._restore()
        is_trained = self.done >= self.total_steps or self.parts.best.is_over
        due = self._due_at_start()
        if is_trained and not due:
            self.progress.close()
            logger.info("nothing to do: step %d of %d is done", self.done, self.total_steps)
            return True
        if not is_trained:
            self._rehearse()
        with self.signal:
            is_stopped = self._evaluate_and_draw(self.done, due)
            is_finished = not is_stopped if is_trained or is_stopped else self._train()
        self.parts.pictures.finish()
        self.progress.close()
        return is_finished

    def _train(self) -> bool:
        """The steps that are left, and what is due behind the last one; False when a signal asked to stop before."""
        if self.parts.best.is_over:  # by an evaluation that the start before left to this one
            self._end_early()
            return True
        stop = False
        self.speed.start()
        self.phases.start()
        self.progress.begin(self.done)
        for step, window in self.phases.around("data", self.loader.windows(self.total_steps)):
            self._train_step(step, window)
            self.done = step + 1
            if (stop := self._after_step(self.done)) or self.parts.best.is_over:
                break
        if self.logged != self.done:  # an evaluation has ended the run between two log lines
            self._log(self.done)
        self.saver.begin(self.done, is_last=True)
        self.saver.finish(is_last=True)
        if self.parts.best.is_over:
            self._end_early()
            return True
        if self.done < self.total_steps:
            return False
        due = self._due(self.done)
        return not (due if stop else self._evaluate_and_draw(self.done, due))

    def _end_early(self) -> None:
        """Say that evaluations get no better, and draw the last pictures."""
        best = self.parts.best
        logger.info("step %d: %s; %d evaluations since, the run ends", self.done, best.summary(), best.since)
        self.tracker.event("ended_early", step=self.done, best=best.found)
        looks = dist.decided_by_main(lambda: self.tracker.looks(self.done))
        if self.recipe.tracking.picture_samples and "pictures" not in looks:
            self._draw(self.done)

    def _train_step(self, step: int, window: Window) -> None:
        """One optimizer step: targets, losses and gradients of each micro-batch, the update; then the EMA is due."""
        sums, skipped = self.totals.values.clone(), self.student.skipped_steps
        work = work_of(window)
        self._set_learning_rate(step)
        self.watchdog.at(step, "prepare", window.ids)
        prepared = self.step.prepare(window.to(dist.device()))
        losses = []
        for micro in prepared.window.micro_batches:
            # not counted by DeepSpeed: filled by tokens, steps have more micro-batches or fewer
            self.student.set_gradient_accumulation_boundary(micro is prepared.window.micro_batches[-1])
            losses.append(self._forward_backward(step, micro, prepared))
            self.watchdog.at(step, "optimizer", window.ids)
            with self.phases("optimizer"):  # at the boundary DeepSpeed clips the gradients and steps
                self.student.step()
        if self.student.skipped_steps > skipped:
            self.totals.values.copy_(sums)
            self.skipped.add(step, window, losses)
        else:
            self.skipped.in_a_row = 0
            if self.teacher is not None:
                self.teacher.mark_stale()
        self.watchdog.at(step, "next samples")
        self.reading = (window.bad, window.retries)
        self.speed.add(work, window.num_padding)

    def _forward_backward(self, step: int, micro: MicroBatch, prepared: Any) -> Tensor:
        """The loss of a micro-batch, whose gradients are added to those of the step."""
        self.watchdog.at(step, "student", micro.ids)
        with self.phases("forward"):
            loss = self.step.loss(micro, prepared, step, self.totals)
        with self.phases("backward"):  # DeepSpeed averages gradients over ranks; ours are parts of one sum
            self.student.backward(loss * dist.world_size(), scale_wrt_gas=False)
        return loss.detach()

    def _set_learning_rate(self, step: int) -> None:
        for group in self.student.optimizer.param_groups:
            group["lr"] = learning_rate(self.recipe.optim, step, self.total_steps)

    def _after_step(self, done: int) -> bool:
        """Log, evaluate and save what is due after `done` steps; True when some rank was asked to stop."""
        recipe, total = self.recipe, self.total_steps
        stop = self._agree()
        last = done == total or self.quarantine.exceeded or stop
        if done % recipe.tracking.every_steps == 0 or last:
            self._log(done)
            self.logged = done
        if done < total and not stop:  # who asks to stop may not wait long: the next start does it
            stop = self._evaluate_and_draw(done, self._due(done))
        if recipe.checkpoint.every_steps and done % recipe.checkpoint.every_steps == 0 and done < total:
            self.saver.begin(done)
        if self.quarantine.exceeded:
            if self.quarantine.max_fraction:  # at 0 no step without a sample is kept
                self.saver.begin(done)
            self.saver.finish()
        self.quarantine.check()
        return stop

    def _agree(self) -> bool:
        """Exchange what the ranks have met in the step; True when some rank was asked to stop."""
        ranks = dist.gather_on_host((self.signal.requested, self.parts.writer.is_written, *self.reading))
        if all(is_written for _, is_written, _, _ in ranks):
            self.saver.finish()
        bad = [sample for _, _, samples, _ in ranks for sample in samples]
        self.quarantine.add(bad, self.loader.samples_of(self.done - 1), sum(retries for *_, retries in ranks))
        return any(is_asked for is_asked, *_ in ranks)

    def _is_stopped(self) -> bool:
        """Whether some rank was asked to stop (collective)."""
        return any(dist.gather_on_host(self.signal.requested))

    @contextmanager
    def _away(self, phase: str) -> Iterator[None]:
        """A phase whose time counts for no rate."""
        with self.speed.paused(), self.phases(phase):
            yield

    def _log(self, done: int) -> None:
        if self.teacher is not None:
            self.watchdog.at(done - 1, "momentum")
            with self.phases("momentum"):
                difference, weight = self.teacher.take_drift().unbind()
            self.watchdog.at(done - 1, "next samples")
            self.totals.add({"drift": difference, "weight": weight})
        metrics = self.step.metrics(self.totals.take())
        metrics["lr"] = learning_rate(self.recipe.optim, done - 1, self.total_steps)
        metrics["grad/norm"] = float(self.student.get_global_grad_norm() or 0.0)
        metrics["optimizer/skipped_steps"] = float(self.student.skipped_steps)
        metrics |= self.quarantine.metrics() | seen_by_set(self.loader.plan, self.step.sets, done)
        metrics["epoch"] = done / self.loader.steps_per_epoch
        metrics |= self.speed.take() | shares(dist.gather_on_host(self.phases.take()))
        metrics |= of_all_ranks(self.memory.take(), self.node.take())
        self.tracker.log(done, metrics)
        self.progress.update(done, metrics)

    def _due(self, done: int) -> set[str]:
        """Which of "evaluation" and "pictures" are due after `done` steps."""
        recipe, is_last = self.recipe, done == self.total_steps
        evaluation, pictures = recipe.evaluation.every_steps, recipe.tracking.pictures_every_steps
        due = set()
        if self.parts.held_out and done and (is_last or (evaluation and done % evaluation == 0)):
            due.add("evaluation")
        if recipe.tracking.picture_samples and (not done or is_last or (pictures and done % pictures == 0)):
            due.add("pictures")
        return due

    def _due_at_start(self) -> set[str]:
        """What is due before the first step: everything in a new run; in a resumed one what the record lacks, because
        the run was killed or told to stop before."""
        path = self.parts.checkpoint
        if path is None:
            return self._due(0)
        if not is_of_run(self.recipe, path):
            return set()
        return self._due(self.done) - dist.decided_by_main(lambda: self.tracker.looks(self.done))

    def _evaluate_and_draw(self, done: int, due: set[str]) -> bool:
        """Do what is due; True when some rank was asked to stop before the end: the next start does the rest."""
        if "evaluation" in due and not self._evaluate(done):
            return True
        if "pictures" in due:
            self._draw(done)
        return False

    def _evaluate(self, done: int) -> bool:
        """Evaluate and record; False when some rank was asked to stop meanwhile."""
        if self.parts.held_out is None:
            return True
        try:
            with self._away("evaluation"):
                metrics = self.parts.held_out(self._is_stopped, lambda: self.watchdog.at(done, "evaluation"))
            is_best = metrics is not None and self.parts.best.add(done, metrics)
        except UserError:  # on all ranks: a mistake in the held-out samples spoils nothing that was learnt
            self.saver.begin(done)
            self.saver.finish()
            raise
        if metrics is None:
            return False
        self.tracker.log(done, metrics)
        logger.info("step %d  %s", done, "  ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
        if is_best and self.parts.best.found is not None:
            self.saver.keep_best(self.parts.best.found)
        return True

    def _draw(self, done: int) -> None:
        self.watchdog.at(done, "pictures")
        with self._away("pictures"):
            self.parts.pictures(done)

    def _restore(self) -> None:
        if self.parts.checkpoint is not None:
            self.done = self.saver.step = restore(self.parts, self.parts.checkpoint)

    def _rehearse(self) -> None:
        """Targets of a window of the longest samples, forward and backward of its first micro-batch, at weight 0.

        Out-of-memory shows in the first minute, not after hours; a gradient of zeros changes nothing.
        """
        if self.parts.rehearsal is None:
            logger.info("sample lengths are not in the data set: no rehearsal (pack with --config to have one)")
            return
        logger.info("rehearsing the longest samples; a first start compiles kernels meanwhile")
        start = time.monotonic()
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
            "rehearsed the longest samples in %.0f s: %d tokens, in all %d of a step, %s",
            time.monotonic() - start, max(window.tokens.lengths), window.num_tokens, self.memory.summary(),
        )  # fmt: skip
