"""What the ranks do in the tests of stage 2."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from deepspeed.utils import safe_get_full_grad

from ilvr_ds import dist
from ilvr_ds.config import DataConfig, LossConfig, OptimConfig, TrainConfig
from tests.distributed.workers import mutilated
from tests.golden_set import golden_set
from tests.runs import SmallRun, golden_recipe


def start(zero: dict[str, Any], checkpointing: bool = False, padding_side: str | None = None, **train: Any) -> SmallRun:
    """A run of the published stage 2 at rate 0 on the golden model in fp32."""
    golden = golden_set()
    recipe = golden_recipe(
        golden,
        train=TrainConfig(stage=2, latent_gradient="full", precision="fp32", **train),
        loss=LossConfig(align_weight=0.0, contrastive_weight=0.0),
        model=dataclasses.replace(golden.model, activation_checkpointing=checkpointing),
        optim=OptimConfig(lr=0.0, weight_decay=0.0, max_grad_norm=0.0),
        data=DataConfig(shards="unused", padding_side=padding_side or golden.padding_side),
    )
    return SmallRun.start(recipe, zero)


def golden_numbers(batches: list[list[int]], zero: dict[str, Any], checkpointing: bool) -> list[dict[str, Any]]:
    """Loss, hidden states and gradients of each batch of samples, from the engine; every rank runs the same batch."""
    run = start(zero, checkpointing)
    return [_golden_batch(run, batch) for batch in batches]


def _golden_batch(run: SmallRun, batch: list[int]) -> dict[str, Any]:
    prepared = run.step.prepare(run.window(batch, len(batch)))
    micro = prepared.window.micro_batches[0]
    stage = run.networks.student.module
    seen: list[torch.Tensor] = []
    hidden = stage.hidden
    stage.hidden = lambda *arguments: seen.append(hidden(*arguments)) or seen[-1]
    loss = run.step.loss(micro, prepared, 0, run.totals)
    del stage.hidden
    run.networks.student.backward(loss * dist.world_size(), scale_wrt_gas=False)
    grads = {n: safe_get_full_grad(p).clone() for n, p in stage.model.named_parameters() if p.requires_grad}
    run.networks.student.step()  # at rate 0: only ends the step, so that gradients start anew
    rows = [row[real] for row, real in zip(seen[0].detach(), micro.tokens.real, strict=True)]
    return {"hidden": rows, "loss": float(loss.detach()), "grads": grads, "sums": run.totals.take()}


def mixed_batches(steps: int, padding_side: str, zero: dict[str, Any], checkpointing: bool) -> dict[str, Any]:
    """Windows with other samples on every rank: no segment, nothing supervised, no image; how often layers ran."""
    golden = golden_set()
    run = start(zero, checkpointing, padding_side, micro_batch_size=2, grad_accum_steps=2)
    calls = [0, 0]
    layer = run.networks.student.module.model.model.language_model.layers[0]
    layer.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    draw = np.random.default_rng(dist.rank())
    losses = []
    for step in range(steps):
        numbers, kinds = draw.integers(0, [[len(golden.encoded)], [5]], (2, 4))
        if step == 0:
            kinds[:] = dist.rank()  # one rank without images, the other without segments
        samples = [mutilated(golden.encoded[i], kind) for i, kind in zip(numbers, kinds, strict=True)]
        window = run.collate(samples, np.arange(4), [2, 2])
        calls[1] += sum((m.rollout.rounds * (golden.settings["latent_size"] + 1)) + 1 for m in window.micro_batches)
        losses.append(run.train(window, step))
    return {"losses": losses, "calls": calls[0], "own": calls[1]}
