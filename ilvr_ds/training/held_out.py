"""Teacher-forced loss and answer accuracy on held-out samples, on all ranks together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch

from ilvr_ds import dist
from ilvr_ds.data.loader import WindowDataset, iterate_windows
from ilvr_ds.data.window import BadSample, Window
from ilvr_ds.monitoring.metric_sums import MetricSums
from ilvr_ds.tracking.names import metric_name
from ilvr_ds.training.free_answers import FreeAnswers
from ilvr_ds.training.quarantines import Quarantines
from ilvr_ds.training.step import TrainingStep, answer_accuracy


@dataclass(frozen=True)
class HeldOutSet:
    """One data set that is evaluated on."""

    name: str
    """"" where it is the only one and no mixture's"""
    steps: int
    """Windows of each rank in an evaluation"""
    groups: list[str]
    """The kinds of task in the data set"""


@dataclass
class _Found:
    """What an evaluation found in one set."""

    sums: dict[str, float] = field(default_factory=dict)
    by_group: dict[str, float] = field(default_factory=dict)
    bad: list[BadSample] = field(default_factory=list)
    samples: int = 0
    retries: int = 0


class HeldOut:
    """Evaluates the windows of `dataset` that `sets` have on each rank, set after set."""

    def __init__(
        self,
        dataset: WindowDataset,
        num_workers: int,
        sets: list[HeldOutSet],
        step: TrainingStep,
        quarantine: Quarantines,
        free_answers: FreeAnswers | None = None,
    ) -> None:
        self.dataset = dataset
        self.sets = sets
        self.steps = sum(one.steps for one in sets)
        self.num_workers = min(num_workers, self.steps)
        self.step = step
        self.quarantine = quarantine
        self.free_answers = free_answers

    @torch.no_grad()
    def __call__(
        self, is_stopped: Callable[[], bool], moved: Callable[[], object] = lambda: None
    ) -> dict[str, float] | None:
        """Metrics `eval/...`; the same on all ranks. Collective.

        is_stopped: asked before each window, with the same answer on all ranks; after a yes nothing more is read, and
        None is returned. moved: called at each window and each token of free answers, which may take long. Bad samples
        do not count. Raises UserError on all ranks where there are too many.
        """
        engine: Any = self.step.student
        engine.eval()
        windows = self._windows()
        found: list[_Found] = []
        for one in self.sets:
            of_set = self._evaluate(one, _telling(islice(windows, one.steps), moved), is_stopped)
            if of_set is None:
                engine.train()
                return None
            found.append(of_set)
        generated = self.free_answers(moved) if self.free_answers else {}
        engine.train()
        skipped = {"eval/skipped": float(self._judge(found))}
        groups = sorted({group for one in self.sets for group in one.groups})
        sums = _added(one.sums for one in found)
        metrics = {f"eval/{name}": value for name, value in self.step.losses(sums).items()}
        metrics |= _accuracies(sums, _added(one.by_group for one in found), groups) | generated | skipped
        for one, part in zip(self.sets, found, strict=True):
            metrics |= self._by_set(one.name, part.sums) if one.name else {}
        return metrics

    def _evaluate(self, one: HeldOutSet, windows: Iterable[Window], is_stopped: Callable[[], bool]) -> _Found | None:
        """Sums over the windows of one set, on all ranks; bad samples, samples and retries of this rank. None after a
        stop."""
        totals, found = MetricSums(self.step.sums, dist.device()), _Found()
        by_group = MetricSums([f"{kind}/{g}" for g in one.groups for kind in ("right", "answers")], dist.device())
        for window in windows:
            if is_stopped():
                return None
            found.bad += window.bad
            found.samples += len(window.ids)
            found.retries += window.retries
            prepared = self.step.prepare(window)
            for micro in prepared.window.micro_batches:
                right = self.step.answers(micro, prepared, totals)
                for group in one.groups:
                    mine = torch.tensor([g == group for g in micro.groups], device=right.device) & micro.has_answer
                    by_group.add({f"right/{group}": (right & mine).sum(), f"answers/{group}": mine.sum()})
        found.sums, found.by_group = totals.take(), by_group.take()
        return found

    def _by_set(self, name: str, sums: dict[str, float]) -> dict[str, float]:
        """The losses and the accuracy of one set of a mixture."""
        values = self.step.losses(sums) | answer_accuracy(sums, "eval")
        return {metric_name(f"eval/{what.removeprefix('eval/')}_by_set", name): v for what, v in values.items()}

    def _judge(self, found: list[_Found]) -> int:
        """Give the bad samples of all ranks to the quarantine; returns their number."""
        mine = [sample for one in found for sample in one.bad]
        ranks = dist.gather_on_host((mine, sum(one.retries for one in found)))
        everyone = [sample for bad, _ in ranks for sample in bad]
        samples = [one.samples * len(ranks) for one in found]
        self.quarantine.add(everyone, samples, sum(retries for _, retries in ranks))
        self.quarantine.check()
        return len(everyone)

    def _windows(self) -> Iterator[Window]:
        for window in iterate_windows(self.dataset, range(self.steps), self.num_workers, pin_memory=False):
            yield window.to(dist.device())


def _telling(windows: Iterable[Window], moved: Callable[[], object]) -> Iterator[Window]:
    """`windows`; `moved` is called at each."""
    for window in windows:
        moved()
        yield window


def _added(parts: Iterable[dict[str, float]]) -> dict[str, float]:
    """The sums of all parts, by name."""
    total: Counter[str] = Counter()
    for part in parts:
        total.update(part)
    return dict(total)


def _accuracies(sums: dict[str, float], groups: dict[str, float], names: list[str]) -> dict[str, float]:
    metrics = {"eval/answers": sums["answers"]} if sums["answers"] else {}
    metrics |= answer_accuracy(sums, "eval")
    for name in names:
        if name and groups[f"answers/{name}"]:
            metrics[metric_name("eval/answer_accuracy", name)] = groups[f"right/{name}"] / groups[f"answers/{name}"]
    return metrics
