"""What the ranks do in the tests of summed gradients."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import safe_get_full_grad

from ilvr_ds import dist
from ilvr_ds.config import OptimConfig, SelectionConfig, TrainConfig
from ilvr_ds.engine import networks
from tests.golden_set import golden_set
from tests.runs import SmallRun, golden_recipe


def errors(micro_batches: int, zero: dict[str, Any], **train: Any) -> dict[str, Any]:
    """How far the gradients of two steps in bf16 are from what all ranks' micro-batches gave, summed in float64."""
    golden = golden_set()
    optim = OptimConfig(lr=1e-3, max_grad_norm=0.0, weight_decay=0.0, schedule="constant")
    settings = TrainConfig(precision="bf16", grad_accum_steps=micro_batches, **train)
    run = SmallRun.start(golden_recipe(golden, optim=optim, train=settings), zero)
    engine = run.networks.student
    parameters = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
    seen: dict[str, torch.Tensor] = {}

    def add(name: str, grad: torch.Tensor) -> None:
        seen[name] = seen.get(name, 0.0) + grad.double() / dist.world_size()

    for name, parameter in parameters.items():
        parameter.register_hook(lambda grad, name=name: add(name, grad))
    found = []
    for step in range(2):
        seen.clear()
        first = micro_batches * (2 * step + dist.rank())
        window = run.window(list(range(first, first + micro_batches)))
        prepared = run.step.prepare(window)
        for micro in prepared.window.micro_batches:
            is_last = micro is prepared.window.micro_batches[-1]
            engine.set_gradient_accumulation_boundary(is_last)
            loss = run.step.loss(micro, prepared, step, run.totals)
            engine.backward(loss * dist.world_size(), scale_wrt_gas=False)
            if is_last:
                summed = {name: safe_get_full_grad(p).double() for name, p in parameters.items()}
            engine.step()
        expected = {name: dist.sum_over_ranks(seen[name].reshape(summed[name].shape)) for name in parameters}
        found.append(max(float((summed[n] - e).norm() / e.norm()) for n, e in expected.items() if e.norm() > 0))
    return {"errors": found, "optimizer": type(engine.optimizer).__name__, "skipped": engine.skipped_steps}


class _Stream:
    """In the place of a GPU's. Ranks on a CPU wait for everything anyway."""

    def wait_stream(self, other: _Stream) -> None:
        """Nothing to wait for."""


def dropped_gradients(is_mended: bool) -> Counter[bool]:
    """A backward as on a GPU, where gradients are summed in a stream of their own: of those that this rank drops while
    they are summed, how many keep their memory for that stream, and how many do not."""
    without_teacher = SelectionConfig(pool="changed", by="change", unchanged="none", temperature=0.1)
    recipe = golden_recipe(golden_set(), selection=without_teacher, train=TrainConfig(precision="bf16"))
    zero = {"stage": 2, "overlap_comm": True, "contiguous_gradients": True, "reduce_bucket_size": 1000}
    kept: set[tuple[int, Any]] = set()
    found: Counter[bool] = Counter()
    reduce = DeepSpeedZeroOptimizer.reduce_ipg_grads

    def watched(optimizer: Any, *arguments: Any, **named: Any) -> None:
        kept.clear()
        large = [(p, p.grad.untyped_storage().data_ptr()) for p in optimizer.extra_large_param_to_reduce.values()]
        reduce(optimizer, *arguments, **named)
        for weight, place in large:
            if weight.grad is None:  # dropped
                found[(place, optimizer.reduction_stream) in kept] += 1

    with pytest.MonkeyPatch.context() as patch:
        accelerator = type(get_accelerator())
        for name in ("is_synchronized_device", "resolves_data_dependency"):
            patch.setattr(accelerator, name, lambda _: False)
        patch.setattr(accelerator, "Stream", _Stream)
        patch.setattr(accelerator, "current_stream", lambda *_: _Stream())
        patch.setattr(
            torch.Tensor, "record_stream", lambda t, stream: kept.add((t.untyped_storage().data_ptr(), stream))
        )
        patch.setattr(DeepSpeedZeroOptimizer, "reduce_ipg_grads", watched)
        if not is_mended:
            patch.setattr(networks, "keep_until_reduced", lambda _: None)
        run = SmallRun.start(recipe, {"zero_optimization": zero})
        run.train(run.window([dist.rank()]), 0)
    return found
