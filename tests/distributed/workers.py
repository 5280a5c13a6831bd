"""What the ranks do in the multi-process tests; each function runs on every rank."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
import numpy as np
import torch
from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses as Constructing
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad
from torch import nn

from ilvr_ds import dist
from ilvr_ds.config import DataConfig, LossConfig, ModelConfig, OptimConfig, TeacherConfig, TrainConfig
from ilvr_ds.data.template import IGNORE, EncodedSample
from ilvr_ds.data.window import MicroBatch, TokenBatch
from ilvr_ds.distill.query import ContextEncoder
from ilvr_ds.model.layers.adapters import add_adapters
from ilvr_ds.model.layers.attention import use_packed_attention
from ilvr_ds.model.layers.four_bit import pack_layers
from ilvr_ds.model.student import DTYPES, load_student
from ilvr_ds.ops.ema import split
from ilvr_ds.ops.reference import candidate_cosines
from ilvr_ds.training.stage1 import PreparedWithTargets, StageOneStep
from tests.golden_set import golden_set
from tests.runs import ZERO3, SmallRun, golden_recipe

ALL_LOSSES = LossConfig(ce_weight=1.0, align_weight=1.0, contrastive_weight=0.5, target_noise_std=0.05)


def golden_numbers(batches: list[list[int]], packing: bool) -> list[dict[str, Any]]:
    """All that the golden set knows, per batch of samples, from the engines; every rank runs the same batch."""
    golden = golden_set()
    frozen_in_time = OptimConfig(lr=0.0, weight_decay=0.0, max_grad_norm=0.0)
    data = DataConfig(shards="unused", padding_side=golden.padding_side, packing=packing)
    run = SmallRun.start(golden_recipe(golden, optim=frozen_in_time, data=data))
    return [_golden_batch(run, batch) for batch in batches]


def _golden_batch(run: SmallRun, batch: list[int]) -> dict[str, Any]:
    window = run.window(batch, len(batch))
    prepared = run.step.prepare(window)
    micro, targets = window.micro_batches[0], prepared.targets
    with _last_hidden(run.networks.teacher.module.language_model) as teacher:
        context = run.networks.teacher(window.tokens, prepared.features, window.context)
    with _last_hidden(run.networks.student.module.model.model.language_model) as student:
        loss, sums, grads = _losses_and_gradients(run, run.step, micro, prepared)
    ce_only = dataclasses.replace(run.recipe.loss, align_weight=0.0)
    ce_step = StageOneStep(run.step.student, run.step.vision, run.step.selector, run.step.teacher, ce_only)
    return {
        "teacher_hidden": _real_rows(teacher[0], window.tokens),
        "student_hidden": _real_rows(student[0], micro.tokens),
        "user": context.user,
        "cosine": candidate_cosines(targets.query, targets.candidates, targets.offsets),
        "offsets": targets.offsets,
        "indices": targets.indices,
        "targets": targets.values(),
        "sample": window.context.sample,
        "loss": loss,
        "sums": sums,
        "grads": grads,
        "ce_grads": _losses_and_gradients(run, ce_step, micro, prepared)[2],
    }


def _losses_and_gradients(
    run: SmallRun, step: StageOneStep, micro: MicroBatch, prepared: PreparedWithTargets
) -> tuple[float, dict[str, float], dict[str, torch.Tensor]]:
    """The step's loss, its sums over all ranks, and the whole gradient of every trained weight."""
    loss = step.loss(micro, prepared, 0, run.totals)
    run.networks.student.backward(loss * dist.world_size(), scale_wrt_gas=False)
    parameters = run.networks.student.module.model.named_parameters()
    grads = {name: safe_get_full_grad(p).clone() for name, p in parameters if p.requires_grad}
    run.networks.student.step()  # at rate 0: only ends the step, so that gradients start anew
    return float(dist.sum_over_ranks(loss.detach())), run.totals.take(), grads


@contextmanager
def _last_hidden(language_model: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collects the last hidden states [B, T, D] of every forward inside the block."""
    seen: list[torch.Tensor] = []
    hook = language_model.register_forward_hook(lambda *call: seen.append(call[-1].last_hidden_state.detach()))
    yield seen
    hook.remove()


def _real_rows(hidden: torch.Tensor, tokens: TokenBatch) -> list[torch.Tensor]:
    if tokens.cu_seqlens is not None:
        return list(hidden[0].split(tokens.lengths))
    return [rows[real] for rows, real in zip(hidden, tokens.real, strict=True)]


def momentum(steps: int, zero: dict[str, Any], model: dict[str, Any], offload: str, precision: str) -> dict[str, float]:
    """Train, and keep a dense float32 average of the student beside; how far the teacher is from it."""
    golden = golden_set()
    settings = dataclasses.replace(golden.model, **model)
    recipe = golden_recipe(
        golden,
        model=settings,
        teacher=TeacherConfig(momentum=0.9, offload=offload),
        train=TrainConfig(precision=precision),
    )
    run = SmallRun.start(recipe, zero)
    dense = _full_weights(run)
    start = copy.deepcopy(dense)
    for step in range(steps):
        run.train(run.window([step + dist.rank()]), step)
        for name, value in _full_weights(run).items():
            dense[name].lerp_(value, 1 - recipe.teacher.momentum)
    averages, published = _averages(run), _teacher_weights(run)
    window = run.window([0, 3], 2)
    features = run.step.prepare(window).features
    seen = run.networks.teacher(window.tokens, features, window.context).user
    dtype = DTYPES[precision]
    plain = load_student(ModelConfig(path=settings.path, attention="sdpa"), dtype, 0).model.language_model
    use_packed_attention(plain, "sdpa", dist.device(), dtype)
    if settings.lora_base != "full":
        pack_layers(plain, lambda _: contextlib.nullcontext(), dist.device())
    if settings.lora_rank:
        add_adapters(plain, settings)

    def error_with(weights: dict[str, torch.Tensor]) -> float:
        plain.load_state_dict({**plain.state_dict(), **weights})
        expected = ContextEncoder(plain)(window.tokens, features, window.context).user
        return float((seen - expected).abs().max() / expected.abs().max())

    def rounded(average: torch.Tensor) -> torch.Tensor:
        return split(average)[0].float() if dtype == torch.bfloat16 else average.to(dtype).float()

    return {
        "average_error": max(float((averages[name] - value).abs().max()) for name, value in dense.items()),
        "published_error": max(float((published[n] - rounded(a)).abs().max()) for n, a in averages.items()),
        "forward_error": error_with({name: rounded(average) for name, average in averages.items()}),
        "stale_error": error_with(start),
        "moved": max(float((start[name] - value).abs().max()) for name, value in dense.items()),
    }


def teacher_in_pieces(at_once: list[int]) -> list[dict[str, Any]]:
    """What the teacher reads of a window of six micro-batches, other samples on each rank, so many at a time; between
    them it moves. And how often its language model is called."""
    run = SmallRun.start()
    teacher, calls = run.step.teacher, [0]
    model = teacher.network.module.language_model
    hook = model.register_forward_pre_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    window = run.window([dist.rank() * 3 + n // 2 for n in range(6)], 1)
    found = []
    for number in at_once:
        run.train(run.window([dist.rank()]), 0)
        features = run.step.vision.features(window)
        teacher.micro_batches_at_once = 99
        whole = teacher.read(window, features)
        teacher.micro_batches_at_once, calls[0] = number, 0
        pieces = teacher.read(window, features)
        errors = [
            float((a.float() - b.float()).abs().max() / b.float().abs().max())
            for a, b in zip(pieces, whole, strict=True)
        ]
        found.append({"error": max(errors), "calls": calls[0]})
    hook.remove()
    return found


def hooked_modules() -> list[list[str]]:
    """Of the student's and the teacher's language model, the modules around which ZeRO-3 has hooks."""
    run = SmallRun.start()
    networks = (run.networks.student.module.model.model.language_model, run.networks.teacher.module.language_model)
    return [[name for name, module in network.named_modules() if hasattr(module, "ds_id")] for network in networks]


def _full_weights(run: SmallRun) -> dict[str, torch.Tensor]:
    """The student's trained language-model weights in float32, whole, by the teacher's names."""
    parameters = run.networks.student.module.model.model.language_model.named_parameters()
    return {name: safe_get_full_fp32_param(p).detach().cpu().clone() for name, p in parameters if p.requires_grad}


def _averages(run: SmallRun) -> dict[str, torch.Tensor]:
    """The float32 averages, whole, put together from the shards of all ranks."""
    shards = zip(*dist.gather_on_host(run.step.teacher.state()), strict=True)
    shapes = {name: p.ds_shape for name, p in run.networks.teacher.module.language_model.named_parameters()}
    names = run.networks.trained
    return {n: torch.cat(s)[: shapes[n].numel()].view(shapes[n]) for n, s in zip(names, shards, strict=True)}


def _teacher_weights(run: SmallRun) -> dict[str, torch.Tensor]:
    weights = {}
    for name, parameter in run.networks.teacher.module.language_model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            weights[name] = parameter.detach().float().cpu().clone()
    return weights


def weights_after(
    steps: int, sizes: list[list[list[int]]], packing: bool, zero: dict[str, Any], **train: Any
) -> dict[str, Any]:
    """All trained weights after some steps of 8 samples each, and the losses.

    sizes: of each rank's micro-batches; steps take the lists of their rank in turn.
    """
    golden = golden_set()
    accumulated = TrainConfig(precision="fp32", grad_accum_steps=max(len(turn) for turn in sizes[0]), **train)
    data = DataConfig(shards="unused", padding_side=golden.padding_side, packing=packing)
    run = SmallRun.start(golden_recipe(golden, train=accumulated, loss=ALL_LOSSES, data=data), zero)
    losses = []
    for step in range(steps):
        turns = [turns[step % len(turns)] for turns in sizes]
        assert sum(map(sum, turns)) == 8
        first = 8 * step + sum(map(sum, turns[: dist.rank()]))
        numbers = np.arange(first, first + sum(turns[dist.rank()]))
        samples = [golden.encoded[i % len(golden.encoded)] for i in numbers]
        losses.append(run.train(run.collate(samples, numbers, turns[dist.rank()]), step))
    return {"weights": all_weights(run), "losses": losses}


def feature_losses(negatives: str, batches: list[list[int]]) -> dict[str, float]:
    """Loss sums over all ranks, of one micro-batch of golden samples on each; `batches` by rank."""
    run = SmallRun.start(
        golden_recipe(golden_set(), loss=dataclasses.replace(ALL_LOSSES, contrastive_negatives=negatives))
    )
    mine = batches[dist.rank()]
    with torch.no_grad():
        prepared = run.step.prepare(run.window(mine, len(mine)))
        run.step.loss(prepared.window.micro_batches[0], prepared, 0, run.totals)
    return run.totals.take()


def with_choices(choices: list[tuple[str, int]], zero: dict[str, Any]) -> list[dict[str, Any]]:
    """Loss and gradients of the same samples for each choice of activation checkpointing and logits chunk."""
    golden = golden_set()
    frozen_in_time = OptimConfig(lr=0.0, weight_decay=0.0, max_grad_norm=0.0)
    results = []
    for checkpointing, chunk in choices:
        # a run before this one, in a process that goes on, has left DeepSpeed's own linear function in place
        torch.nn.functional.linear = getattr(Constructing, "linear_bk", torch.nn.functional.linear)
        model = dataclasses.replace(golden.model, activation_checkpointing=checkpointing)
        loss = dataclasses.replace(ALL_LOSSES, logits_chunk=chunk)
        run = SmallRun.start(golden_recipe(golden, model=model, loss=loss, optim=frozen_in_time), zero)
        window = run.window([2 * dist.rank(), 2 * dist.rank() + 1], 2)
        prepared = run.step.prepare(window)
        value, _, grads = _losses_and_gradients(run, run.step, window.micro_batches[0], prepared)
        results.append({"loss": value, "grads": grads, "labels": len(window.micro_batches[0].label_ids)})
    return results


def all_weights(run: SmallRun) -> dict[str, torch.Tensor]:
    """The student's, whole and in float32."""
    weights = {n: safe_get_full_fp32_param(p) for n, p in run.networks.student.module.model.named_parameters()}
    return {name: value.detach().clone() for name, value in weights.items()}


def with_and_without_rehearsal(zero: dict[str, Any], grad_accum_steps: int) -> list[dict[str, torch.Tensor]]:
    """All trained weights after two bf16 steps: without, and with the backward of a zero loss before them."""
    golden = golden_set()
    optim = OptimConfig(lr=1e-3, max_grad_norm=1.0, schedule="constant")
    train = TrainConfig(precision="bf16", grad_accum_steps=grad_accum_steps)
    results = []
    for rehearse in (False, True):
        run = SmallRun.start(golden_recipe(golden, optim=optim, train=train, loss=ALL_LOSSES), zero)
        if rehearse:
            prepared = run.step.prepare(run.window([2] * grad_accum_steps))
            loss = run.step.loss(prepared.window.micro_batches[0], prepared, 0, run.totals)
            run.networks.student.backward(0.0 * loss, scale_wrt_gas=False)
        for step in range(2):
            first = grad_accum_steps * (2 * step + dist.rank())
            run.train(run.window(list(range(first, first + grad_accum_steps))), step)
        results.append(all_weights(run))
    return results


def trained_by(optimizers: list[str], offload: bool, steps: int, precision: str = "fp32") -> list[dict[str, Any]]:
    """For each optimizer: all trained weights after some steps on the same samples, and how far they moved."""
    golden = golden_set()
    zero = copy.deepcopy(ZERO3)
    if offload:
        zero["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    results = []
    for name in optimizers:
        optim = OptimConfig(name=name, lr=1e-3, weight_decay=0.01, max_grad_norm=1.0, schedule="constant")
        train = TrainConfig(precision=precision)
        run = SmallRun.start(golden_recipe(golden, optim=optim, train=train, loss=ALL_LOSSES), zero)
        before = _full_weights(run)
        losses = [run.train(run.window([0]), step) for step in range(steps)]
        after = _full_weights(run)
        moved = max(float((after[n] - before[n]).abs().max()) for n in before)
        dtype = next(run.networks.student.module.parameters()).dtype
        results.append({"weights": after, "moved": moved, "losses": losses, "dtype": dtype})
    return results


def mixed_batches(
    steps: int, rows: str, negatives: str, zero: dict[str, Any] = ZERO3, checkpointing: str = "none", **train: Any
) -> dict[str, Any]:
    """Windows whose samples have no image, no segment, nothing supervised, one or many, are very short or very long,
    different on every rank. Returns the losses, and how often modules and collectives were called."""
    golden = golden_set()
    recipe = golden_recipe(
        golden,
        train=TrainConfig(precision="fp32", micro_batch_size=2, grad_accum_steps=2, **train),
        model=dataclasses.replace(golden.model, activation_checkpointing=checkpointing),
        loss=dataclasses.replace(ALL_LOSSES, contrastive_negatives=negatives),
        data=DataConfig(shards="unused", packing=rows == "packed", padding_side=rows.replace("packed", "right")),
    )
    run = SmallRun.start(recipe, zero)
    draw = np.random.default_rng(dist.rank())
    losses = []
    with _counted_calls(run) as calls:
        for step in range(steps):
            numbers, kinds = draw.integers(0, [[len(golden.encoded)], [7]], (2, 4))
            samples = [mutilated(golden.encoded[i], kind) for i, kind in zip(numbers, kinds, strict=True)]
            losses.append(run.train(run.collate(samples, np.arange(4), [[2, 2], [1, 3]][rows == "packed"]), step))
    return {"losses": losses, "calls": dict(calls)}


COLLECTIVES = (
    "all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast", "barrier",
    "all_gather_object", "broadcast_object_list",
)  # fmt: skip


@contextmanager
def _counted_calls(run: SmallRun) -> Iterator[Counter[str]]:
    """Counts forward calls of every module of both networks, and calls of torch's collectives."""
    calls: Counter[str] = Counter()
    hooks = []
    for which, engine in (("student", run.networks.student), ("teacher", run.networks.teacher)):
        for name, module in engine.module.named_modules():
            label = f"{which} {name}"
            hooks.append(module.register_forward_pre_hook(lambda *_, label=label: calls.update([label])))
    true = {name: getattr(torch.distributed, name) for name in COLLECTIVES}

    def counted(name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            calls[name] += 1
            return true[name](*arguments, **options)

        return call

    for name in COLLECTIVES:
        setattr(torch.distributed, name, counted(name))
    try:
        yield calls
    finally:
        for name in COLLECTIVES:
            setattr(torch.distributed, name, true[name])
        for hook in hooks:
            hook.remove()


def mutilated(sample: EncodedSample, kind: int) -> EncodedSample:
    """A sample without images (kind 0), segments (1) or labels (2), very long (3), very short (4), or as it is."""
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
    if kind == 3:  # very long: its last token again and again
        return _lengthened(sample, 600)
    if kind == 4:  # very short: text alone, the assistant's turn and two tokens around it
        bare = mutilated(mutilated(sample, 0), 1)
        kept = slice(bare.assistant - 2, bare.assistant + 5)
        return dataclasses.replace(
            bare, input_ids=bare.input_ids[kept], labels=bare.labels[kept], position_ids=bare.position_ids[:, :7],
            assistant=2, answer=(0, 0),
        )  # fmt: skip
    return sample


def _lengthened(sample: EncodedSample, more: int) -> EncodedSample:
    last = sample.position_ids[:, -1:]
    return dataclasses.replace(
        sample,
        input_ids=np.append(sample.input_ids, np.repeat(sample.input_ids[-1], more)),
        labels=np.append(sample.labels, np.repeat(sample.input_ids[-1], more)),
        position_ids=np.concatenate([sample.position_ids, last + np.arange(1, more + 1)], axis=1),
    )


__all__ = ["ZERO3"]
