"""LoRA adapters (Hu et al., 2021) on the linear layers of a language model: PEFT's, with another forward."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from ilvr_ds.config import ModelConfig
from ilvr_ds.errors import UserError

NAME = "default"
"""The adapter's name: PEFT's default, a part of the weights' names."""


def add_adapters(language_model: Any, settings: ModelConfig) -> None:
    """Add adapters to the linear layers of the decoder, in student and teacher alike.

    Raises UserError where `model.lora_targets` names none.
    """
    from peft import LoraConfig, inject_adapter_in_model  # slow to import: it brings DeepSpeed along
    from peft.tuners.lora.layer import Linear

    lora = LoraConfig(r=settings.lora_rank, lora_alpha=settings.lora_alpha, target_modules=list(settings.lora_targets))
    try:
        inject_adapter_in_model(lora, language_model, adapter_name=NAME)
    except ValueError as error:
        raise UserError(f"model.lora_targets: {error}") from error
    # selective checkpointing keeps products, which must not change then
    is_in_place = settings.activation_checkpointing != "selective"
    # not the last layer: the teacher calls its parts one by one, and ZeRO-3 gathers the weights of what is called
    for layer in language_model.layers[:-1]:
        for module in layer.modules():
            if isinstance(module, Linear):
                module.forward = partial(_adapted, module, is_in_place)


def _adapted(linear: Any, is_in_place: bool, x: Tensor) -> Tensor:
    """W x + s B A x, [..., in] -> [..., out]: s scales A x, and the product with B adds to W x.

    PEFT scales and adds in separate passes over outputs a hundred times wider than A x, forward and backward.
    """
    rows = x.flatten(0, -2)
    down, up = (part[NAME].weight.to(x.dtype) for part in (linear.lora_A, linear.lora_B))
    low = nn.functional.linear(rows, down) * linear.scaling[NAME]
    base = linear.base_layer(rows)
    whole: Tensor = (base.addmm_ if is_in_place else base.addmm)(low, up.t())
    return whole.view(*x.shape[:-1], whole.shape[-1])
