"""How an optimizer step is computed, whatever the stage: what the loop asks of it, and what the stages share.

The loop in trainer.py knows *when*; a step (stage1.py, stage2.py) knows *how*.
"""

from __future__ import annotations

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

    @property
    def teacher(self) -> MomentumTeacher | None:
        """The EMA of the student that selects targets, if the stage has one."""

    def prepare(self, window: Window) -> Any:
        """What the micro-batches of a window share (a Prepared). Collective."""

    def loss(self, micro: MicroBatch, prepared: Any, step: int, totals: MetricSums) -> Tensor:
        """This micro-batch's part of the step's loss: summed over micro-batches and ranks it is the step's loss."""

    def answers(self, micro: MicroBatch, prepared: Any, totals: MetricSums) -> Tensor:
        """[B] bool: is the answer of each sample the most probable one? Adds the losses to `totals`."""

    def losses(self, sums: dict[str, float]) -> dict[str, float]:
        """Mean losses by name, from sums over all ranks."""

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
    """What the teacher selected, as rows of `candidates`; None without a teacher."""


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


def answer_accuracy(sums: dict[str, float], prefix: str) -> dict[str, float]:
    """The share of answers that are right, where there are answers, as a metric."""
    return {f"{prefix}/answer_accuracy": sums["right"] / sums["answers"]} if sums["answers"] else {}
