"""How one optimizer step of stage 2 is computed: as in stage 1, or without targets and the cross-entropy alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ilvr_ds import dist
from ilvr_ds.data.window import MicroBatch, Window
from ilvr_ds.model.vision import StoredFeatures, VisionTower
from ilvr_ds.monitoring.metric_sums import MetricSums
from ilvr_ds.monitoring.phases import PhaseTimer
from ilvr_ds.ops.reference import pool_candidates
from ilvr_ds.training.stage1 import PreparedWithTargets, StageOneStep
from ilvr_ds.training.step import (
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


def with_equal_rounds(window: Window, latent_size: int) -> Window:
    """The window with layouts of equally many rounds on all ranks (collective, through host memory, once a step).

    Under ZeRO-3 every layer call is collective, so ranks whose samples have fewer segments add empty rounds.
    """
    layouts = [micro.rollout for micro in window.micro_batches if micro.rollout]
    rounds = map(max, zip(*dist.gather_on_host([layout.rounds for layout in layouts]), strict=True))
    micro_batches = tuple(
        replace(micro, rollout=layout.with_rounds(most, latent_size))
        for micro, layout, most in zip(window.micro_batches, layouts, rounds, strict=True)
    )
    return replace(window, micro_batches=micro_batches)


class TaughtStageTwoStep(StageOneStep):
    """Stage 2 with targets: a step of stage 1 whose `student` is the engine around a StageTwo."""

    @torch.no_grad()
    def prepare(self, window: Window) -> PreparedWithTargets:
        """Features, targets, global counts, and layouts of equal length, of a window that is on the device already."""
        prepared = super().prepare(window)
        return replace(prepared, window=with_equal_rounds(prepared.window, self.selector.latent_size))


class StageTwoStep:
    """Vision and student of stage 2 without targets. `student` is the engine around a StageTwo."""

    teacher = None

    def __init__(
        self,
        student: Any,
        vision: VisionTower | StoredFeatures,
        latent_size: int,
        types: tuple[str, ...] = (),
        sets: tuple[str, ...] = (),
    ) -> None:
        self.student = student
        self.vision = vision
        self.latent_size = latent_size
        self.types, self.sets = types, sets
        self.sums = ["ce", "supervised", "right", "answers", *type_sums(types), *set_sums(sets, ["ce"])]
        self.phases = PhaseTimer(dist.device())

    @torch.no_grad()
    def prepare(self, window: Window) -> Prepared:
        """Features and global counts of a window that is on the device already, and layouts of equal length."""
        with self.phases("vision"):
            features = self.vision.features(window)
        supervised = dist.sum_over_ranks(window.supervised.float()).clamp(min=1).squeeze(0)
        return Prepared(with_equal_rounds(window, self.latent_size), features, supervised)

    def loss(self, micro: MicroBatch, prepared: Prepared, step: int, totals: MetricSums) -> Tensor:
        """This micro-batch's part of the step's loss: summed over micro-batches and ranks it is the step's loss."""
        loss: Tensor = self._sums(micro, prepared, totals)["ce"] / prepared.supervised
        return loss

    def answers(self, micro: MicroBatch, prepared: Prepared, totals: MetricSums) -> Tensor:
        """[B] bool: is the answer of each sample the most probable one? Adds the losses to `totals`."""
        return self._sums(micro, prepared, totals)["right"]

    def losses(self, sums: dict[str, float]) -> dict[str, float]:
        """Mean losses by name, from sums over all ranks; none that nothing was counted for."""
        return mean_losses(sums, ["ce"])

    def metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """Means over the logged interval and all ranks."""
        ce = self.losses(sums).get("ce")
        losses = {} if ce is None else {"loss/total": ce, "loss/ce": ce}
        split = ce_by_type(sums, self.types) | losses_by_set(sums, self.sets)
        return losses | split | answer_accuracy(sums, "train")

    @torch.no_grad()
    def probe(self, micro: MicroBatch, prepared: Prepared) -> LatentProbe:
        """The latents that the student feeds itself, beside the patches of helper images, which no step reads.

        The window must be of samples that were encoded with their helper images.
        """
        where, latents = prepared.window.candidates, self.student(micro, prepared.features)["prediction"]
        features = prepared.features[:, : latents.shape[-1]]
        candidates = pool_candidates(features, where.rows, where.weights)[micro.candidate_rows]
        return LatentProbe(latents, candidates, None)

    def _sums(self, micro: MicroBatch, prepared: Prepared, totals: MetricSums) -> dict[str, Tensor]:
        sums: dict[str, Tensor] = self.student(micro, prepared.features)
        answers = micro.has_answer.sum()
        counts = {"supervised": torch.full_like(answers, len(micro.label_ids)), "answers": answers}
        shown = {name: sums[name].detach().sum() for name in ("ce", "right")}
        totals.add({**counts, **shown, **by_type(micro, sums, self.types), **by_set(micro, sums, self.sets)})
        return sums
