"""How one optimizer step of stage 1 is computed: features and targets once for the window, losses per micro-batch.

The loop in trainer.py knows *when*; a step knows *how*. Nothing here waits for the device, but once a step for the
momentum update: the teacher's weights must be in host memory before they are fetched from there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ilvr_ds import dist
from ilvr_ds.config import LossConfig
from ilvr_ds.data.window import MicroBatch, Window
from ilvr_ds.distill.selection import Targets
from ilvr_ds.distill.similarity import similarity, unit_sums
from ilvr_ds.distill.stage1 import Negatives
from ilvr_ds.distill.teacher import MomentumTeacher
from ilvr_ds.model.vision import StoredFeatures, VisionTower
from ilvr_ds.monitoring.phases import PhaseTimer
from ilvr_ds.monitoring.target_watch import TargetWatch
from ilvr_ds.tracking.names import metric_name
from ilvr_ds.training.metric_sums import MetricSums, ratio

SUMS = [
    "ce", "alignment", "contrastive", "supervised", "slots", "segments", "entropy", "cosine_top1", "right", "answers",
    "drift", "weight", "pool", "unchanged", "stands_out", "similarity", "pairs",
]  # fmt: skip


class TrainingStep(Protocol):
    """What the loop and the evaluation ask of a stage."""

    student: Any
    """The engine around the stage's root module."""
    phases: PhaseTimer
    """Where the time of its parts goes."""
    sums: list[str]
    """Names of the sums that are kept over steps; `loss` and `answers` add to them."""
    types: tuple[str, ...]
    """The kinds of task by which losses are split."""

    @property
    def teacher(self) -> MomentumTeacher | None:
        """What follows the student after each optimizer step, if anything does."""

    def prepare(self, window: Window) -> Any:
        """What the micro-batches of a window share; its attribute `window` holds them. Collective."""

    def loss(self, micro: MicroBatch, prepared: Any, step: int, totals: MetricSums) -> Tensor:
        """This micro-batch's part of the step's loss: summed over micro-batches and ranks it is the step's loss."""

    def answers(self, micro: MicroBatch, prepared: Any, totals: MetricSums) -> Tensor:
        """[B] bool: is the answer of each sample the most probable one? Adds the losses to `totals`."""

    def losses(self, sums: dict[str, float]) -> dict[str, float]:
        """Mean losses by name, from sums over all ranks."""

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """What is logged of the training steps since the last time, from sums over all ranks."""

    def look(self, micro: MicroBatch, prepared: Any) -> LatentProbe:
        """Where the micro-batch's latents look. Collective."""


@dataclass(frozen=True)
class LatentProbe:
    """What the latents of a micro-batch are held against, for pictures. M segments, K slots, N candidates."""

    latents: Tensor
    """[M, K, D]: what the student makes at each slot"""
    candidates: Tensor
    """[N, D]"""
    targets: Targets | None
    """What the teacher picked, in the rows of `candidates`; None without a teacher."""


@dataclass(frozen=True)
class Prepared:
    """A window on the device with all that its micro-batches share."""

    window: Window
    features: Tensor
    """[F, D]"""
    targets: Targets
    supervised: Tensor
    """[] float32: supervised tokens of the step on all ranks, at least 1"""
    slots: Tensor
    """[] float32: latent slots with a target on all ranks, at least 1"""
    alike: tuple[Tensor, Tensor]
    """Of all ranks' targets: the sum of cosines over pairs from different samples, and the number of such pairs"""


class StageOneStep:
    """Vision, teacher and student of stage 1, put together. `student` is the engine around a StageOne."""

    def __init__(
        self,
        student: Any,
        vision: VisionTower | StoredFeatures,
        teacher: MomentumTeacher,
        settings: LossConfig,
        types: tuple[str, ...] = (),
    ) -> None:
        self.student = student
        self.vision = vision
        self.teacher = teacher
        self.settings = settings
        self.types = types
        self.sums = SUMS + type_sums(types)
        self.phases = PhaseTimer(dist.device())
        self.watch = TargetWatch()

    @torch.no_grad()
    def prepare(self, window: Window) -> Prepared:
        """Features, targets and global counts of a window that is on the device already."""
        with self.phases("vision"):
            features = self.vision.features(window)
        with self.phases("momentum"):  # what vision has not hidden of it
            self.teacher.update()
        with self.phases("teacher"):
            context = self.teacher.read(window, features)
        with self.phases("selection"):
            targets = self.teacher.select(window, features, context)
        counts = [window.supervised.float(), targets.kept.sum(0, keepdim=True).float()]
        alike = unit_sums(targets, window.context.sample, len(window.context.prompt))
        sums = dist.sum_over_ranks(torch.cat([*counts, alike]))
        supervised, slots = sums[:2].clamp(min=1).unbind()
        return Prepared(window, features, targets, supervised, slots, similarity(sums[2:]))

    def loss(self, micro: MicroBatch, prepared: Prepared, step: int, totals: MetricSums) -> Tensor:
        """This micro-batch's part of the step's loss: summed over micro-batches and ranks it is the step's loss."""
        sums = self._sums(micro, prepared, step, totals)
        s = self.settings
        per_slot = s.align_weight * sums["alignment"] + s.contrastive_weight * sums["contrastive"]
        loss: Tensor = s.ce_weight * sums["ce"] / prepared.supervised + per_slot / prepared.slots
        return loss

    def answers(self, micro: MicroBatch, prepared: Prepared, totals: MetricSums) -> Tensor:
        """[B] bool: is the answer of each sample the most probable one? Adds the losses to `totals`."""
        return self._sums(micro, prepared, 0, totals)["right"]

    def losses(self, sums: dict[str, float]) -> dict[str, float]:
        """Mean losses by name, from sums over all ranks."""
        per_slot = {name: ratio(sums[name], sums["slots"]) for name in ("alignment", "contrastive")}
        return {"ce": ratio(sums["ce"], sums["supervised"]), **per_slot}

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """Means over the logged interval and all ranks, from the sums of SUMS."""
        losses, s = self.losses(sums), self.settings
        weighted = s.ce_weight * losses["ce"] + s.align_weight * losses["alignment"]
        metrics = {
            "loss/total": weighted + s.contrastive_weight * losses["contrastive"],
            **{f"loss/{name}": value for name, value in losses.items()},
            "select/kept_per_segment": ratio(sums["slots"], sums["segments"]),
            "select/entropy": ratio(sums["entropy"], sums["segments"]),
            "select/cosine_top1": ratio(sums["cosine_top1"], sums["segments"]),
            "select/pool_size": ratio(sums["pool"], sums["segments"]),
            "teacher/drift": math.sqrt(ratio(sums["drift"], sums["weight"])),
            "teacher/momentum": self.teacher.shards.momentum,
        }
        if self.teacher.selection.pool == "changed":
            metrics["select/unchanged"] = ratio(sums["unchanged"], sums["segments"])
            metrics["select/changed_share"] = ratio(sums["stands_out"], sums["slots"])
        if sums["pairs"]:
            metrics["select/target_similarity"] = sums["similarity"] / sums["pairs"]
        self.watch(metrics)
        return metrics | ce_by_type(sums, self.types) | answer_accuracy(sums, "train")

    def look(self, micro: MicroBatch, prepared: Prepared) -> LatentProbe:
        """What the student foresees at each slot, and what the teacher picked for it."""
        targets = prepared.targets.of(micro)
        sums = self.student(micro, prepared.features, targets, 0, self._foreign(targets))
        return LatentProbe(sums["prediction"], targets.candidates, targets)

    def _sums(self, micro: MicroBatch, prepared: Prepared, step: int, totals: MetricSums) -> dict[str, Tensor]:
        targets = prepared.targets.of(micro)
        sums: dict[str, Tensor] = self.student(micro, prepared.features, targets, step, self._foreign(targets))
        shown = {name: sums[name].detach().sum() for name in ("ce", "alignment", "contrastive", "right")}
        parts = len(prepared.window.micro_batches)  # each adds its part of what is the window's
        alike = {name: value / parts for name, value in zip(("similarity", "pairs"), prepared.alike, strict=True)}
        totals.add({**_counts(micro, targets), **alike, **shown, **by_type(micro, sums, self.types)})
        return sums

    def _foreign(self, targets: Targets) -> Negatives | None:
        """Candidates of the other ranks' micro-batches; their number is known on the host."""
        if self.settings.contrastive_negatives != "world" or dist.world_size() == 1:
            return None
        counts = dist.gather_on_host(len(targets.candidates))
        everyone = dist.all_gather_rows(targets.candidates, counts)
        return Negatives(torch.cat([rows for r, rows in enumerate(everyone) if r != dist.rank()]))


def _counts(micro: MicroBatch, targets: Targets) -> dict[str, Tensor]:
    best = targets.candidates[targets.indices[:, 0].clamp(min=0)] if len(targets.candidates) else targets.query
    kept = targets.kept.sum()
    return {
        "supervised": torch.full_like(kept, len(micro.label_ids)),
        "slots": kept,
        "segments": torch.full_like(kept, len(micro.segments)),
        "entropy": targets.entropy.sum(),
        "cosine_top1": torch.nn.functional.cosine_similarity(best.float(), targets.query.float(), dim=-1).sum(),
        "answers": micro.has_answer.sum(),
        **_pool_counts(targets, kept),
    }


def _pool_counts(targets: Targets, kept: Tensor) -> dict[str, Tensor]:
    """Candidates in the pool; segments in which nothing changed; selected candidates that stand out by their change."""
    pool = targets.pool
    if pool is None:
        return {"pool": torch.full_like(kept, len(targets.candidates))}
    counts = {"pool": pool.members.sum()}
    if pool.stands_out is not None and pool.unchanged is not None and len(targets.candidates):
        stands_out = pool.stands_out[targets.indices.clamp(min=0)] & (targets.indices >= 0)
        counts |= {"unchanged": pool.unchanged.sum(), "stands_out": stands_out.sum()}
    return counts


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
