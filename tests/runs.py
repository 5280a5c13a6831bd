"""Small runs for tests: a recipe around the golden model, networks on this rank, windows of golden samples."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ilvr_ds import dist
from ilvr_ds.config import DataConfig, DeepSpeedConfig, OptimConfig, Recipe, RunConfig, TeacherConfig, TrainConfig
from ilvr_ds.data.template import EncodedSample
from ilvr_ds.data.window import Window
from ilvr_ds.engine.networks import Networks, init_process_group
from ilvr_ds.model.encoding import Encoding
from ilvr_ds.model.student import load_config, vision_layout
from ilvr_ds.monitoring.metric_sums import MetricSums
from ilvr_ds.training.assembly import build_step
from tests.golden_set import GoldenSet, equal_sizes, golden_set, without_helpers

ZERO3: dict[str, Any] = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}


def golden_recipe(golden: GoldenSet, **changes: Any) -> Recipe:
    """fp32, the golden set's settings, packed rows; `changes` replace whole sections."""
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
    """A student, a teacher (where there is one) and a step around golden samples."""

    golden: GoldenSet
    recipe: Recipe
    networks: Networks
    step: Any
    """The TrainingStep of the recipe's stage."""
    totals: MetricSums

    @staticmethod
    def start(recipe: Recipe | None = None, zero: dict[str, Any] = ZERO3, initial: Path | None = None) -> SmallRun:
        golden = golden_set()
        recipe = recipe or golden_recipe(golden)
        init_process_group()
        config = load_config(recipe.model.path)
        encoding = Encoding(golden.encoder, golden.encoder.special, vision_layout(config), config)
        step, networks = build_step(recipe, zero, encoding, initial)
        return SmallRun(golden, recipe, networks, step, MetricSums(step.sums, dist.device()))

    def window(self, indices: list[int], micro_batch_size: int | None = None) -> Window:
        """The golden samples with these indices as this rank's window."""
        size = micro_batch_size or self.recipe.train.micro_batch_size
        samples = [self.golden.encoded[i % len(self.golden.encoded)] for i in indices]
        return self.collate(samples, np.array(indices), equal_sizes(len(samples), size))

    def collate(self, samples: list[EncodedSample], numbers: Any, sizes: list[int]) -> Window:
        """Encoded samples as this rank's window of the recipe's stage, in micro-batches of these sizes."""
        is_free = self.recipe.train.has_free_latents
        rows = "packed" if self.recipe.packs else self.recipe.data.padding_side
        collator = self.golden.collator(rows, is_free, self.recipe.selection.pool)
        seen = samples if self.recipe.has_targets else [without_helpers(s) for s in samples]
        return collator(seen, numbers, sizes).to(dist.device())

    def train(self, window: Window, step: int) -> float:
        """One optimizer step; returns the loss over all ranks."""
        prepared = self.step.prepare(window)
        total = torch.zeros((), device=dist.device())
        for micro in prepared.window.micro_batches:
            self.networks.student.set_gradient_accumulation_boundary(micro is prepared.window.micro_batches[-1])
            loss = self.step.loss(micro, prepared, step, self.totals)
            self.networks.student.backward(loss * dist.world_size(), scale_wrt_gas=False)
            self.networks.student.step()
            total += loss.detach()
        if self.step.teacher is not None:
            self.step.teacher.mark_stale()
        return float(dist.sum_over_ranks(total))
