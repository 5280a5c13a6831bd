"""What the ranks do in the multi-process tests; each function runs on every rank."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import deepspeed
import numpy as np
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

from ilvr_ds import dist
from ilvr_ds.config import DataConfig, LossConfig, ModelConfig, OptimConfig, TeacherConfig, TrainConfig
from ilvr_ds.data.template import IGNORE, EncodedSample
from ilvr_ds.distill.query import ContextEncoder
from ilvr_ds.model.student import add_adapters, load_student
from ilvr_ds.ops.reference import candidate_cosines
from tests.golden_set import golden_set
from tests.runs import ZERO3, SmallRun, golden_recipe

ALL_LOSSES = LossConfig(ce_weight=1.0, align_weight=1.0, contrastive_weight=0.5, target_noise_std=0.05)


def golden_numbers(batches: list[list[int]]) -> list[dict[str, Any]]:
    """All that the golden set knows, per batch of samples, from the engines; every rank runs the same batch."""
    golden = golden_set()
    frozen_in_time = OptimConfig(lr=0.0, weight_decay=0.0, max_grad_norm=0.0)
    run = SmallRun.start(golden_recipe(golden, optim=frozen_in_time))
    return [_golden_batch(run, batch) for batch in batches]


def _golden_batch(run: SmallRun, batch: list[int]) -> dict[str, Any]:
    window = run.window(batch, len(batch))
    prepared = run.step.prepare(window)
    micro, targets = window.micro_batches[0], prepared.targets
    context = run.networks.teacher(window.tokens, prepared.features, window.context)
    loss = run.step.loss(micro, prepared, 0, run.totals)
    run.networks.student.backward(loss * dist.world_size(), scale_wrt_gas=False)
    names = {name: p for name, p in run.networks.student.module.model.named_parameters() if p.requires_grad}
    grads = {name: safe_get_full_grad(p).clone() for name, p in names.items()}
    run.networks.student.step()  # at rate 0: only ends the step, so that gradients start anew
    return {
        "user": context.user,
        "cosine": candidate_cosines(targets.query, targets.candidates, targets.offsets),
        "offsets": targets.offsets,
        "indices": targets.indices,
        "targets": targets.values(),
        "sample": window.context.sample,
        "loss": float(loss.detach()) * dist.world_size(),
        "sums": run.totals.take(),
        "grads": grads,
    }


def momentum(steps: int, zero: dict[str, Any], model: dict[str, Any], offload: str) -> dict[str, float]:
    """Train, and keep a dense float32 average of the student beside; how far the teacher is from it."""
    golden = golden_set()
    settings = dataclasses.replace(golden.model, **model)
    recipe = golden_recipe(golden, model=settings, teacher=TeacherConfig(momentum=0.9, offload=offload))
    run = SmallRun.start(recipe, zero)
    dense = _full_weights(run)
    start = copy.deepcopy(dense)
    for step in range(steps):
        run.train(run.window([step % 6 + dist.rank()]), step)
        for name, value in _full_weights(run).items():
            dense[name].lerp_(value, 1 - recipe.teacher.momentum)
    teacher = _teacher_weights(run)
    window = run.window([0, 3], 2)
    features = run.step.prepare(window).features
    seen = run.networks.teacher(window.tokens, features, window.context)
    plain = load_student(ModelConfig(path=settings.path, attention="sdpa"), torch.float32, 0).model.language_model
    if settings.lora_rank:
        add_adapters(plain, settings)
    plain.load_state_dict({**plain.state_dict(), **dense})
    expected = ContextEncoder(plain)(window.tokens, features, window.context)
    return {
        "teacher_error": max(float((teacher[name] - value).abs().max()) for name, value in dense.items()),
        "forward_error": float((seen.user - expected.user).abs().max() / expected.user.abs().max()),
        "moved": max(float((start[name] - value).abs().max()) for name, value in dense.items()),
        "trained": len(dense),
    }


def _full_weights(run: SmallRun) -> dict[str, torch.Tensor]:
    """The student's trained language-model weights in float32, whole, by the teacher's names."""
    parameters = run.networks.student.module.model.model.language_model.named_parameters()
    return {name: safe_get_full_fp32_param(p).detach().cpu().clone() for name, p in parameters if p.requires_grad}


def _teacher_weights(run: SmallRun) -> dict[str, torch.Tensor]:
    weights = {}
    for name, parameter in run.networks.teacher.module.language_model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            weights[name] = parameter.detach().float().cpu().clone()
    return weights


def weights_after(steps: int, micro_batch_size: int, grad_accum_steps: int, zero: dict[str, Any]) -> dict[str, Any]:
    """All trained weights after some steps of 8 samples each, and the losses."""
    golden = golden_set()
    train = TrainConfig(precision="fp32", micro_batch_size=micro_batch_size, grad_accum_steps=grad_accum_steps)
    run = SmallRun.start(golden_recipe(golden, train=train, loss=ALL_LOSSES), zero)
    share = 8 // dist.world_size()
    assert share == micro_batch_size * grad_accum_steps
    losses = []
    for step in range(steps):
        first = 8 * step + share * dist.rank()
        losses.append(run.train(run.window(list(range(first, first + share))), step))
    weights = {n: safe_get_full_fp32_param(p) for n, p in run.networks.student.module.model.named_parameters()}
    return {"weights": {name: value.detach().clone() for name, value in weights.items()}, "losses": losses}


def mixed_batches(steps: int, padding_side: str, negatives: str) -> list[float]:
    """Windows whose samples have no image, no segment, nothing supervised, one or many, different on every rank."""
    golden = golden_set()
    recipe = golden_recipe(
        golden,
        train=TrainConfig(precision="fp32", micro_batch_size=2, grad_accum_steps=2),
        loss=dataclasses.replace(ALL_LOSSES, contrastive_negatives=negatives),
        data=DataConfig(shards="unused", padding_side=padding_side),
    )
    run = SmallRun.start(recipe)
    draw = np.random.default_rng(dist.rank())
    collator = golden.collator(2, padding_side)
    losses = []
    for step in range(steps):
        samples = [
            _mutilated(golden.encoded[i], kind) for i, kind in zip(*draw.integers(0, [[6], [5]], (2, 4)), strict=True)
        ]
        losses.append(run.train(collator(samples, np.arange(4)), step))
    return losses


def _mutilated(sample: EncodedSample, kind: int) -> EncodedSample:
    special = golden_set().encoder.special
    if kind == 0:  # no input image: its tokens become text
        ids = np.where(sample.input_ids == special.image_pad, special.im_end, sample.input_ids)
        n = sample.num_input_images
        return dataclasses.replace(
            sample, input_ids=ids, patches=sample.patches[n:], grids=sample.grids[n:], num_input_images=0
        )
    if kind == 1:  # no segment: the latent tokens stay as text without a meaning
        n = sample.num_input_images
        none = np.empty(0, dtype=np.int64)
        return dataclasses.replace(sample, segments=none, patches=sample.patches[:n], grids=sample.grids[:n])
    if kind == 2:  # nothing supervised
        return dataclasses.replace(sample, labels=np.full_like(sample.labels, IGNORE))
    return sample


__all__ = ["ZERO3"]
