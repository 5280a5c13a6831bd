"""How an optimizer step of stage 1 is computed: features and targets once for the window, losses per micro-batch.

Only the EMA makes the host wait for the device, once a step: the teacher's weights must be in host memory before they
are fetched from there.
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
from ilvr_ds.distill.query import Context
from ilvr_ds.distill.selection import Targets
from ilvr_ds.distill.selector import Selector
from ilvr_ds.distill.similarity import similarity, unit_sums
from ilvr_ds.distill.stage1 import Negatives
from ilvr_ds.distill.teacher import MomentumTeacher
from ilvr_ds.model.vision import StoredFeatures, VisionTower
from ilvr_ds.monitoring.metric_sums import MetricSums, means
from ilvr_ds.monitoring.phases import PhaseTimer
from ilvr_ds.monitoring.target_watch import TargetWatch
from ilvr_ds.ops.reference import segment_of_rows
from ilvr_ds.training.step import (
    LOSSES,
    LatentProbe,
    Prepared,
    answer_accuracy,
    by_set,
    by_type,
    ce_by_type,
    losses_by_set,
    mean_losses,
    set_sums,
    type_sums,
)

SUMS = [
    "ce", "alignment", "contrastive", "supervised", "slots", "segments", "entropy", "cosine_top1", "right", "answers",
    "drift", "weight", "pool", "unchanged", "stands_out", "similarity", "pairs",
]  # fmt: skip


@dataclass(frozen=True)
class PreparedWithTargets(Prepared):
    """A window on the device, with its targets."""

    targets: Targets
    slots: Tensor
    """[] float32: latent slots with a target on all ranks, at least 1"""
    similarity: tuple[Tensor, Tensor]
    """Over the targets of all ranks: the sum of cosines of pairs from different samples, and the number of pairs"""


class StageOneStep:
    """Vision, selection and student of stage 1, put together. `student` is the engine around a StageOne.

    teacher: None where the selection asks for no query.
    """

    def __init__(
        self,
        student: Any,
        vision: VisionTower | StoredFeatures,
        selector: Selector,
        teacher: MomentumTeacher | None,
        settings: LossConfig,
        types: tuple[str, ...] = (),
        sets: tuple[str, ...] = (),
    ) -> None:
        self.student = student
        self.vision = vision
        self.selector = selector
        self.teacher = teacher
        self.settings = settings
        self.types, self.sets = types, sets
        self.sums = SUMS + type_sums(types) + set_sums(sets, LOSSES)
        self.phases = PhaseTimer(dist.device())
        self.watch = TargetWatch(selector.settings.unchanged)

    @torch.no_grad()
    def prepare(self, window: Window) -> PreparedWithTargets:
        """Features, targets and global counts of a window that is on the device already."""
        with self.phases("vision"):
            features = self.vision.features(window)
        context = self._read(window, features)
        with self.phases("selection"):
            targets = self.selector(window, features, context)
        counts = [window.supervised.float(), targets.kept.sum(0, keepdim=True).float()]
        alike = unit_sums(targets, window.context.sample, len(window.context.prompt))
        sums = dist.sum_over_ranks(torch.cat([*counts, alike]))
        supervised, slots = sums[:2].clamp(min=1).unbind()
        return PreparedWithTargets(window, features, supervised, targets, slots, similarity(sums[2:]))

    def _read(self, window: Window, features: Tensor) -> Context | None:
        """What the teacher, where there is one, reads after its update."""
        if self.teacher is None:
            return None
        with self.phases("momentum"):  # what of the EMA did not run beside vision
            self.teacher.update()
        with self.phases("teacher"):
            return self.teacher.read(window, features)

    def loss(self, micro: MicroBatch, prepared: PreparedWithTargets, step: int, totals: MetricSums) -> Tensor:
        """This micro-batch's part of the step's loss: summed over micro-batches and ranks it is the step's loss."""
        sums = self._sums(micro, prepared, step, totals)
        s = self.settings
        per_slot = s.align_weight * sums["alignment"] + s.contrastive_weight * sums["contrastive"]
        loss: Tensor = s.ce_weight * sums["ce"] / prepared.supervised + per_slot / prepared.slots
        return loss

    def answers(self, micro: MicroBatch, prepared: PreparedWithTargets, totals: MetricSums) -> Tensor:
        """[B] bool: is the answer of each sample the most probable one? Adds the losses to `totals`."""
        return self._sums(micro, prepared, 0, totals)["right"]

    def losses(self, sums: dict[str, float]) -> dict[str, float]:
        """Mean losses by name, from sums over all ranks; none that nothing was counted for."""
        return mean_losses(sums, LOSSES)

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """Means over the logged interval and all ranks, from the sums of SUMS."""
        losses, s, selection = self.losses(sums), self.settings, self.selector.settings
        chosen = sums["segments"] - (sums["unchanged"] if selection.unchanged == "none" else 0)
        weights = {"ce": s.ce_weight, "alignment": s.align_weight, "contrastive": s.contrastive_weight}
        metrics = {
            **({"loss/total": sum(weights[name] * value for name, value in losses.items())} if losses else {}),
            **{f"loss/{name}": value for name, value in losses.items()},
        }
        parts = {
            "select/kept_per_segment": (sums["slots"], sums["segments"]),
            "select/entropy": (sums["entropy"], chosen),
            "select/pool_size": (sums["pool"], sums["segments"]),
        }
        if self.teacher is not None:
            parts["select/cosine_top1"] = (sums["cosine_top1"], sums["segments"])
            if sums["weight"]:
                metrics["teacher/drift"] = math.sqrt(sums["drift"] / sums["weight"])
            metrics["teacher/momentum"] = self.teacher.shards.momentum
        if selection.pool == "changed":
            parts["select/unchanged"] = (sums["unchanged"], sums["segments"])
            parts["select/changed_share"] = (sums["stands_out"], sums["slots"])
        metrics |= means(parts)
        if sums["pairs"]:
            metrics["select/target_similarity"] = sums["similarity"] / sums["pairs"]
        self.watch(metrics)
        split = ce_by_type(sums, self.types) | losses_by_set(sums, self.sets)
        return metrics | split | answer_accuracy(sums, "train")

    def probe(self, micro: MicroBatch, prepared: PreparedWithTargets) -> LatentProbe:
        """The student's prediction at each slot, and what was selected for it."""
        targets = prepared.targets.of(micro)
        sums = self.student(micro, prepared.features, targets, 0, self._foreign(micro, targets))
        return LatentProbe(sums["prediction"], targets.candidates, targets)

    def _sums(
        self, micro: MicroBatch, prepared: PreparedWithTargets, step: int, totals: MetricSums
    ) -> dict[str, Tensor]:
        targets = prepared.targets.of(micro)
        sums: dict[str, Tensor] = self.student(micro, prepared.features, targets, step, self._foreign(micro, targets))
        shown = {name: sums[name].detach().sum() for name in ("ce", "alignment", "contrastive", "right")}
        parts = len(prepared.window.micro_batches)  # each adds its part of what is the window's
        alike = {name: value / parts for name, value in zip(("similarity", "pairs"), prepared.similarity, strict=True)}
        split = by_type(micro, sums, self.types) | by_set(micro, sums, self.sets, targets.kept)
        totals.add({**_counts(micro, targets), **alike, **shown, **split})
        return sums

    def _foreign(self, micro: MicroBatch, targets: Targets) -> Negatives | None:
        """Candidates of the other ranks' micro-batches; their number is known on the host."""
        if self.settings.contrastive_negatives != "world" or dist.world_size() == 1:
            return None
        counts = dist.gather_on_host(len(targets.candidates))
        samples = micro.noise_keys[segment_of_rows(targets.offsets, len(targets.candidates)), :1]
        return Negatives(_of_others(targets.candidates, counts), _of_others(samples, counts)[:, 0])


def _of_others(rows: Tensor, counts: list[int]) -> Tensor:
    """The `rows` [counts[rank], X] of all other ranks (collective)."""
    everyone = dist.all_gather_rows(rows, counts)
    return torch.cat([part for rank, part in enumerate(everyone) if rank != dist.rank()])


def _counts(micro: MicroBatch, targets: Targets) -> dict[str, Tensor]:
    kept = targets.kept.sum()
    return {
        "supervised": torch.full_like(kept, len(micro.label_ids)),
        "slots": kept,
        "segments": torch.full_like(kept, len(micro.segments)),
        "entropy": targets.entropy.sum(),
        "answers": micro.has_answer.sum(),
        **({} if targets.query is None else {"cosine_top1": _largest_cosines(targets, targets.query).sum()}),
        **_pool_counts(targets, kept),
    }


def _largest_cosines(targets: Targets, query: Tensor) -> Tensor:
    """[M]: of the cosines of what was selected to the query the largest, wherever it stands; 0 where nothing was."""
    cosines = torch.nn.functional.cosine_similarity(targets.values().float(), query.float()[:, None], dim=-1)
    largest = cosines.masked_fill(targets.indices < 0, -torch.inf).amax(1)
    return torch.where(targets.kept > 0, largest, 0.0)


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
