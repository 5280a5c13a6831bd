"""Small runs for tests: a recipe around the golden model, networks on this rank, windows of golden samples."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch

from ilvr_ds import dist
from ilvr_ds.config import DataConfig, DeepSpeedConfig, OptimConfig, Recipe, RunConfig, TeacherConfig, TrainConfig
from ilvr_ds.data.window import Window
from ilvr_ds.distill.momentum import MomentumShards
from ilvr_ds.distill.teacher import MomentumTeacher
from ilvr_ds.model.student import load_config
from ilvr_ds.training.engine import Networks, build_networks, init_process_group
from ilvr_ds.training.step import SUMS, StageOneStep
from ilvr_ds.training.totals import Totals
from tests.golden_set import GoldenSet, golden_set

ZERO3: dict[str, Any] = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}


def golden_recipe(golden: GoldenSet, **changes: Any) -> Recipe:
    """fp32, the golden set's settings; `changes` replace whole sections."""
    recipe = Recipe(
        run=RunConfig(name="test"),
        data=DataConfig(shards="unused", padding_side=golden.padding_side),
        model=golden.model,
        selection=golden.selection,
        loss=golden.loss,
        optim=OptimConfig(lr=1e-3, max_grad_norm=0.0, schedule="constant"),
        teacher=TeacherConfig(momentum=0.9),
        train=TrainConfig(precision="fp32"),
        deepspeed=DeepSpeedConfig(config="unused"),
    )
    return dataclasses.replace(recipe, **changes)


@dataclasses.dataclass
class SmallRun:
    """A student, a teacher and a step around golden samples."""

    golden: GoldenSet
    recipe: Recipe
    networks: Networks
    step: StageOneStep
    totals: Totals

    @staticmethod
    def start(recipe: Recipe | None = None, zero: dict[str, Any] = ZERO3) -> SmallRun:
        golden = golden_set()
        recipe = recipe or golden_recipe(golden)
        init_process_group()
        encoder = golden.encoder
        config = load_config(recipe.model.path)
        stats = (encoder.images.mean, encoder.images.std)
        networks = build_networks(recipe, zero, config, len(encoder.tokenizer), stats)
        shards = MomentumShards(
            networks.teacher_shards(), networks.student_shards(), recipe.teacher.momentum, dist.device()
        )
        teacher = MomentumTeacher(
            networks.teacher, shards, networks.student_shards, recipe.selection, recipe.model.latent_size
        )
        step = StageOneStep(networks.student, networks.tower, teacher, recipe.loss)
        return SmallRun(golden, recipe, networks, step, Totals(SUMS, dist.device()))

    def window(self, indices: list[int], micro_batch_size: int | None = None) -> Window:
        """The golden samples with these indices as this rank's window."""
        size = micro_batch_size or self.recipe.train.micro_batch_size
        samples = [self.golden.encoded[i % len(self.golden.encoded)] for i in indices]
        collator = self.golden.collator(size, self.recipe.data.padding_side)
        return collator(samples, np.array(indices)).to(dist.device())

    def train(self, window: Window, step: int) -> float:
        """One optimizer step; returns the loss over all ranks."""
        prepared = self.step.prepare(window)
        total = torch.zeros((), device=dist.device())
        for micro in window.micro_batches:
            loss = self.step.loss(micro, prepared, step, self.totals)
            self.networks.student.backward(loss * dist.world_size(), scale_wrt_gas=False)
            self.networks.student.step()
            total += loss.detach()
        self.step.teacher.follow()
        return float(dist.sum_over_ranks(total))
