"""How an optimizer step is computed, whatever the stage: what the loop asks of it, and what the stages share.

The loop in trainer.py knows *when*; a step (stage1.py, stage2.py) knows *how*.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from ilvr_ds.data.window import MicroBatch, Window
from ilvr_ds.distill.selection import Targets
from ilvr_ds.distill.teacher import MomentumTeacher
from ilvr_ds.monitoring.metric_sums import MetricSums
from ilvr_ds.monitoring.phases import PhaseTimer
from ilvr_ds.tracking.names import metric_name


class TrainingStep(Protocol):
    """What the loop and the evaluation ask of a stage."""

    student: Any
    """The engine around the stage's root module."""
    phases: PhaseTimer
    """Times the phases of a step."""
    sums: list[str]
    """Names of the metric sums; `loss` and `answers` add to them."""
    types: tuple[str, ...]
    """The kinds of task by which losses are split."""
    sets: tuple[str, ...]
    """The data sets of a mixture, by which they are split too; none without one."""

    @property
    def teacher(self) -> MomentumTeacher | None:
        """The EMA of the student that is asked for queries, if the run has one."""

    def prepare(self, window: Window) -> Any:
        """What the micro-batches of a window share (a Prepared). Collective."""

    def loss(self, micro: MicroBatch, prepared: Any, step: int, totals: MetricSums) -> Tensor:
        """This micro-batch's part of the step's loss: summed over micro-batches and ranks it is the step's loss."""

    def answers(self, micro: MicroBatch, prepared: Any, totals: MetricSums) -> Tensor:
        """[B] bool: is the answer of each sample the most probable one? Adds the losses to `totals`."""

    def losses(self, sums: dict[str, float]) -> dict[str, float]:
        """Mean losses by name, from sums over all ranks; none that nothing was counted for."""

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """The metrics of a logged interval, from sums over all ranks."""

    def probe(self, micro: MicroBatch, prepared: Any) -> LatentProbe:
        """The micro-batch's latents, and what they may resemble. Collective."""


@dataclass(frozen=True)
class LatentProbe:
    """The latents of a micro-batch beside their candidates, for pictures. M segments, K slots, N candidates."""

    latents: Tensor
    """[M, K, D]: the student's prediction at each slot"""
    candidates: Tensor
    """[N, D]"""
    targets: Targets | None
    """What was selected, as rows of `candidates`; None where nothing is."""


@dataclass(frozen=True)
class Prepared:
    """A window on the device, with what its micro-batches share."""

    window: Window
    features: Tensor
    """[F, D or more]"""
    supervised: Tensor
    """[] float32: supervised tokens of the step on all ranks, at least 1"""


def type_sums(types: tuple[str, ...]) -> list[str]:
    """Names of the sums that are kept for each kind of task."""
    return [f"{kind}/{name}" for kind in ("ce", "supervised") for name in types]


def by_type(micro: MicroBatch, sums: dict[str, Tensor], types: tuple[str, ...]) -> dict[str, Tensor]:
    """The sums of `type_sums` of one micro-batch, 0-dimensional."""
    parts = [*sums["ce_by_type"].unbind(), *micro.supervised_by_type.unbind()]
    return dict(zip(type_sums(types), parts, strict=True))


def ce_by_type(sums: dict[str, float], types: tuple[str, ...]) -> dict[str, float]:
    """Mean cross-entropy of each kind of task that had labels, as metrics."""
    seen = [name for name in types if sums[f"supervised/{name}"]]
    return {metric_name("loss/ce_by_type", name): sums[f"ce/{name}"] / sums[f"supervised/{name}"] for name in seen}


LOSSES = {"ce": "supervised", "alignment": "slots", "contrastive": "slots"}
"""The losses, of all samples and of each data set of a mixture, and what they are means over."""


def mean_losses(sums: dict[str, float], losses: Iterable[str]) -> dict[str, float]:
    """Mean `losses` by name; those that had no labels or slots are left out, for 0 would be the best of all."""
    return {name: sums[name] / count for name in losses if (count := sums[LOSSES[name]])}


def set_sums(sets: tuple[str, ...], losses: Iterable[str]) -> list[str]:
    """Names of the sums that are kept for each data set of a mixture."""
    kinds = dict.fromkeys(name for loss in losses for name in (loss, LOSSES[loss]))
    return [f"{kind}_by_set/{name}" for kind in kinds for name in sets]


def by_set(
    micro: MicroBatch, sums: dict[str, Tensor], sets: tuple[str, ...], kept: Tensor | None = None
) -> dict[str, Tensor]:
    """The sums of `set_sums` of one micro-batch, 0-dimensional; none where it does not know its sets.

    kept [M]: latent slots of each segment that have a target.
    """
    if micro.supervised_by_set is None or micro.segment_sets is None:
        return {}
    parts = {"ce_by_set": sums["ce_by_set"], "supervised_by_set": micro.supervised_by_set}
    if kept is not None:
        parts |= {name: sums[name] for name in ("alignment_by_set", "contrastive_by_set")}
        parts["slots_by_set"] = kept.new_zeros(len(sets)).index_add(0, micro.segment_sets, kept)
    return {
        f"{what}/{name}": value
        for what, values in parts.items()
        for name, value in zip(sets, values.unbind(), strict=True)
    }


def losses_by_set(sums: dict[str, float], sets: tuple[str, ...]) -> dict[str, float]:
    """Mean losses of each data set of a mixture that had labels or slots, as metrics."""
    return {
        metric_name(f"loss/{loss}_by_set", name): sums[f"{loss}_by_set/{name}"] / count
        for loss, counted in LOSSES.items()
        for name in sets
        if (count := sums.get(f"{counted}_by_set/{name}", 0.0))
    }


def answer_accuracy(sums: dict[str, float], prefix: str) -> dict[str, float]:
    """The share of answers that are right, where there are answers, as a metric."""
    return {f"{prefix}/answer_accuracy": sums["right"] / sums["answers"]} if sums["answers"] else {}
