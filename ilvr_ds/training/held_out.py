"""Teacher-forced loss and answer accuracy on held-out samples, on all ranks together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ilvr_ds import dist
from ilvr_ds.data.loader import WindowDataset, iterate_windows
from ilvr_ds.data.window import BadSample, Window
from ilvr_ds.monitoring.metric_sums import MetricSums
from ilvr_ds.tracking.names import metric_name
from ilvr_ds.training.free_answers import FreeAnswers
from ilvr_ds.training.quarantine import Quarantine
from ilvr_ds.training.step import TrainingStep, answer_accuracy


class HeldOut:
    """Evaluates `steps` windows of `dataset` on each rank; `groups` are the kinds of task in the data set."""

    def __init__(
        self,
        dataset: WindowDataset,
        num_workers: int,
        steps: int,
        groups: list[str],
        step: TrainingStep,
        quarantine: Quarantine,
        free_answers: FreeAnswers | None = None,
    ) -> None:
        self.dataset = dataset
        self.num_workers = min(num_workers, steps)
        self.steps = steps
        self.groups = groups
        self.step = step
        self.quarantine = quarantine
        self.free_answers = free_answers

    @torch.no_grad()
    def __call__(self) -> dict[str, float]:
        """Metrics `eval/...`; the same on all ranks. Collective.

        Bad samples do not count. Raises UserError on all ranks where there are too many.
        """
        engine: Any = self.step.student
        totals = MetricSums(self.step.sums, dist.device())
        by_group = MetricSums([f"{kind}/{g}" for g in self.groups for kind in ("right", "answers")], dist.device())
        bad: list[BadSample] = []
        samples = retries = 0
        engine.eval()
        for window in self._windows():
            bad += window.bad
            samples, retries = samples + len(window.ids), retries + window.retries
            prepared = self.step.prepare(window)
            for micro in prepared.window.micro_batches:
                right = self.step.answers(micro, prepared, totals)
                for group in self.groups:
                    mine = torch.tensor([g == group for g in micro.groups], device=right.device) & micro.has_answer
                    by_group.add({f"right/{group}": (right & mine).sum(), f"answers/{group}": mine.sum()})
        generated = self.free_answers() if self.free_answers else {}
        engine.train()
        skipped = {"eval/skipped": float(self._judge(bad, samples, retries))}
        sums = totals.take()
        losses = {f"eval/{name}": value for name, value in self.step.losses(sums).items()}
        return losses | _accuracies(sums, by_group.take(), self.groups) | generated | skipped

    def _judge(self, bad: list[BadSample], samples: int, retries: int) -> int:
        """Give the bad samples of all ranks to the quarantine; returns their number."""
        ranks = dist.gather_on_host((bad, retries))
        everyone = [sample for found, _ in ranks for sample in found]
        self.quarantine.add(everyone, samples * len(ranks), sum(count for _, count in ranks))
        self.quarantine.check()
        return len(everyone)

    def _windows(self) -> Iterator[Window]:
        for window in iterate_windows(self.dataset, range(self.steps), self.num_workers, pin_memory=False):
            yield window.to(dist.device())


def _accuracies(sums: dict[str, float], groups: dict[str, float], names: list[str]) -> dict[str, float]:
    metrics = {"eval/answers": sums["answers"]} if sums["answers"] else {}
    metrics |= answer_accuracy(sums, "eval")
    for name in names:
        if name and groups[f"answers/{name}"]:
            metrics[metric_name("eval/answer_accuracy", name)] = groups[f"right/{name}"] / groups[f"answers/{name}"]
    return metrics
