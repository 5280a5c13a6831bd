"""What the ranks do in the tests of summed gradients."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.utils import safe_get_full_grad

from ilvr_ds import dist
from ilvr_ds.config import OptimConfig, TrainConfig
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
