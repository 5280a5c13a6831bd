"""The optimizer of a recipe: whether it can run here, how it is made, what a resumed run changes of it."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import deepspeed
import torch
from deepspeed.ops.op_builder import CPUAdamBuilder
from torch import nn

from ilvr_ds import dist
from ilvr_ds.config import OptimConfig
from ilvr_ds.engine.build_locks import building
from ilvr_ds.errors import UserError


def check_optimizer(name: str, file_settings: dict[str, Any]) -> None:
    """Raise UserError where the optimizer cannot run, before anything is loaded."""
    if name.endswith("8bit") and find_spec("bitsandbytes") is None:
        raise UserError(f"optim.name is {name}: needs bitsandbytes; pip install bitsandbytes")
    offload = file_settings.get("zero_optimization", {}).get("offload_optimizer") or {}
    if name == "cpu_adam" and dist.device().type == "cuda" and offload.get("device") != "cpu":
        raise UserError(
            "optim.name is cpu_adam: needs offload_optimizer in the file that deepspeed.config names, as "
            "ds_configs/zero3_offload_optimizer.json has it"
        )


def apply_settings(student: Any, settings: OptimConfig) -> None:
    """The recipe's settings in place of those that a checkpoint has brought back; the rate is set at each step."""
    for group in student.optimizer.param_groups:
        group.update(_common(settings), lr=group["lr"])
    if hasattr(student.optimizer, "clip_grad"):  # ZeRO-1 and 2 read it back too
        student.optimizer.clip_grad = settings.max_grad_norm


def _common(settings: OptimConfig) -> dict[str, Any]:
    """What all optimizers are told."""
    return {
        "lr": settings.lr,
        "betas": (settings.beta1, settings.beta2),
        "eps": settings.eps,
        "weight_decay": settings.weight_decay,
    }


def build_optimizer(settings: OptimConfig, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW over `parameters`: torch's, DeepSpeed's on the host, or one of bitsandbytes' in 8 bits."""
    common = _common(settings)
    if settings.name == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **common)
    if settings.name == "cpu_adam":
        with building("cpu_adam"):
            CPUAdamBuilder().load()
        optimizer: torch.optim.Optimizer = deepspeed.ops.adam.DeepSpeedCPUAdam(parameters, adamw_mode=True, **common)
        return optimizer
    from ilvr_ds.engine.eight_bit import AdamW8bitInPieces, PagedAdamW8bitInPieces  # bitsandbytes is optional

    cls = AdamW8bitInPieces if settings.name == "adamw_8bit" else PagedAdamW8bitInPieces
    quantised: torch.optim.Optimizer = cls(parameters, **common)
    return quantised
