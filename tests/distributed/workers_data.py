"""Stand-ins on real ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepspeed.utils import safe_get_full_grad

from ilvr_ds import dist
from ilvr_ds.config import load_recipe
from ilvr_ds.engine.networks import init_process_group
from ilvr_ds.errors import UserError
from ilvr_ds.training.assembly import assemble
from ilvr_ds.training.trainer import Trainer
from tests.runs import SmallRun


def with_and_without_stand_ins() -> list[dict[str, Any]]:
    """Loss and gradients of two samples a rank: alone, and among stand-ins. Rank 1 alone has a window of stand-ins."""
    run = SmallRun.start()
    stand_in = run.golden.encoder.stand_in("lost")
    mine = run.golden.encoded[:2] if dist.rank() == 0 else [stand_in, stand_in]
    mixed = [mine[0], stand_in, stand_in, mine[1]]
    windows = [
        run.collate(mine, np.array([0, 1]), [1, 1]),
        run.collate(mixed, np.array([0, 7, 8, 1]), [2, 2]),
    ]
    return [_loss_and_gradients(run, window) for window in windows]


def train_until_refused(recipe: str, overrides: list[str]) -> str:
    """What a run says that ends by a mistake of its user."""
    init_process_group()
    parts = assemble(load_recipe(recipe, overrides), Path(recipe))
    try:
        Trainer(parts).fit()
    except UserError as error:
        return str(error)
    finally:
        parts.tracker.close("FAILED")
    raise AssertionError("the run went to its end")


def _loss_and_gradients(run: SmallRun, window: Any) -> dict[str, Any]:
    prepared = run.step.prepare(window)
    total, grads = torch.zeros(()), {}
    for micro in window.micro_batches:
        loss = run.step.loss(micro, prepared, 0, run.totals)
        run.networks.student.backward(loss * dist.world_size(), scale_wrt_gas=False)
        total += loss.detach()
        for name, parameter in run.networks.student.module.model.named_parameters():
            if parameter.requires_grad:
                grads[name] = grads.get(name, 0) + safe_get_full_grad(parameter).clone()
        run.networks.student.optimizer.param_groups[0]["lr"] = 0.0
        run.networks.student.step()
    counts = {name: value for name, value in run.totals.take().items() if name in ("supervised", "slots", "segments")}
    return {"loss": float(dist.sum_over_ranks(total)), "grads": grads, "counts": counts}
