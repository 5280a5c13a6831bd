"""How one optimizer step is computed: features and targets once for the window, losses for each micro-batch.

The loop in trainer.py knows *when*; this file knows *how*. Nothing here waits for the device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ilvr_ds import dist
from ilvr_ds.config import LossConfig
from ilvr_ds.data.window import MicroBatch, Window
from ilvr_ds.distill.selection import Targets
from ilvr_ds.distill.stage1 import Negatives
from ilvr_ds.distill.teacher import MomentumTeacher
from ilvr_ds.model.vision import VisionTower
from ilvr_ds.training.totals import Totals, ratio

SUMS = [
    "ce", "alignment", "contrastive", "supervised", "slots", "segments", "entropy", "cosine_top1", "right", "answers",
]  # fmt: skip


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


class StageOneStep:
    """Vision, teacher and student of stage 1, put together. `student` is the engine around a StageOne."""

    def __init__(self, student: Any, tower: VisionTower, teacher: MomentumTeacher, settings: LossConfig) -> None:
        self.student = student
        self.tower = tower
        self.teacher = teacher
        self.settings = settings

    @torch.no_grad()
    def prepare(self, window: Window) -> Prepared:
        """Features, targets and global counts of a window that is on the device already."""
        features = torch.cat([self.tower(images) for images in window.images])
        targets = self.teacher.targets(window, features)
        counts = torch.cat([window.supervised.float(), targets.kept.sum(0, keepdim=True).float()])
        supervised, slots = dist.sum_over_ranks(counts).clamp(min=1).unbind()
        return Prepared(window, features, targets, supervised, slots)

    def loss(self, micro: MicroBatch, prepared: Prepared, step: int, totals: Totals) -> Tensor:
        """This micro-batch's part of the step's loss: summed over micro-batches and ranks it is the step's loss."""
        sums = self._sums(micro, prepared, step, totals)
        s = self.settings
        per_slot = s.align_weight * sums["alignment"] + s.contrastive_weight * sums["contrastive"]
        loss: Tensor = s.ce_weight * sums["ce"] / prepared.supervised + per_slot / prepared.slots
        return loss

    def answers(self, micro: MicroBatch, prepared: Prepared, totals: Totals) -> Tensor:
        """[B] bool: is the answer of each sample the most probable one? Adds the losses to `totals`."""
        return self._sums(micro, prepared, 0, totals)["right"]

    def _sums(self, micro: MicroBatch, prepared: Prepared, step: int, totals: Totals) -> dict[str, Tensor]:
        targets = prepared.targets.of(micro)
        sums: dict[str, Tensor] = self.student(micro, prepared.features, targets, step, self._foreign(targets))
        totals.add({**_counts(micro, targets), **{name: sums[name].detach().sum() for name in sums}})
        return sums

    def _foreign(self, targets: Targets) -> Negatives | None:
        """Candidates of the other ranks' micro-batches; their number is known on the host."""
        if self.settings.contrastive_negatives != "world" or dist.world_size() == 1:
            return None
        counts = dist.gather_on_host(len(targets.candidates))
        everyone = dist.gather_rows(targets.candidates, counts)
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
    }


def step_metrics(sums: dict[str, float], settings: LossConfig) -> dict[str, float]:
    """Means over the logged interval and all ranks, from the sums of SUMS, "drift" and "weight"."""
    ce = ratio(sums["ce"], sums["supervised"])
    alignment, contrastive = (ratio(sums[name], sums["slots"]) for name in ("alignment", "contrastive"))
    per_slot = settings.align_weight * alignment + settings.contrastive_weight * contrastive
    metrics = {
        "loss/total": settings.ce_weight * ce + per_slot,
        "loss/ce": ce,
        "loss/alignment": alignment,
        "loss/contrastive": contrastive,
        "select/kept_per_segment": ratio(sums["slots"], sums["segments"]),
        "select/entropy": ratio(sums["entropy"], sums["segments"]),
        "select/cosine_top1": ratio(sums["cosine_top1"], sums["segments"]),
        "teacher/drift": math.sqrt(ratio(sums["drift"], sums["weight"])),
    }
    if sums["answers"]:
        metrics["train/answer_accuracy"] = sums["right"] / sums["answers"]
    return metrics
