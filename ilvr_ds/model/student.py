"""Loading a stock model as a student: tower apart, vocabulary large enough, the right weights trainable."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig

from ilvr_ds.config import ModelConfig
from ilvr_ds.data.images import VisionLayout
from ilvr_ds.errors import UserError, first_line
from ilvr_ds.model.base_weights import check_weights
from ilvr_ds.model.families import FAMILIES, family_of
from ilvr_ds.model.layers.adapters import add_adapters
from ilvr_ds.model.layers.attention import attention_backend
from ilvr_ds.model.layers.checkpointing import checkpoint_arguments

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""What precisions are called in recipes and on the command line."""

Gather = Callable[[list[nn.Parameter]], AbstractContextManager[Any]]
"""Opens a block in which sharded parameters are whole on every rank."""

ROW_MULTIPLE = 64
"""Embeddings grow to a multiple of this, which suits matrix products."""


def load_config(path: str) -> Any:
    """The configuration at `path`; raises UserError where there is none, or none that can be trained."""
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"model.path: no model at '{path}' ({first_line(error)})") from error
    names = [family.name for family in FAMILIES]
    if config.model_type.endswith("_moe"):
        raise UserError(
            f"model.path: '{path}' holds a {config.model_type} model; mixture-of-experts models are not supported, "
            f"only the dense ones of {' and '.join(names)}"
        )
    if config.model_type not in names:
        raise UserError(f"model.path: '{path}' holds a {config.model_type} model; expected {' or '.join(names)}")
    if quantised := getattr(config, "quantization_config", None):
        method = quantised.get("quant_method", "unknown method") if isinstance(quantised, dict) else quantised
        raise UserError(
            f"model.path: '{path}' is quantised ({method}); take the original weights, and for a base in 4 bits under "
            "adapters model.lora_base: nf4"
        )
    if "sliding_attention" in (getattr(config.text_config, "layer_types", None) or ()):
        raise UserError(f"model.path: '{path}' uses sliding-window attention, which is not supported")
    return config


def vision_layout(config: Any) -> VisionLayout:
    """The sizes of the tower that the data side needs."""
    return family_of(config).layout(config.vision_config)


def load_student(settings: ModelConfig, dtype: torch.dtype, num_tokens: int, with_tower: bool = True) -> Any:
    """The stock model with weights read or drawn; born sharded where a ZeRO-3 configuration is active.

    The embedding keeps its padded row count and grows only where the tokenizer has more than that (`num_tokens`).
    with_tower False: `model.visual` is None, and its blocks are neither built nor read.
    """
    config = load_config(settings.path)
    if not with_tower:
        family_of(config).leave_out_tower(config.vision_config)
    attention = attention_backend(settings.attention, dtype)
    if settings.random_init:
        model = family_of(config).model._from_config(config, attn_implementation=attention, dtype=dtype)
    else:
        model = _read_weights(settings.path, config, dtype, attention)
    if not with_tower:
        model.model.visual = None
    if num_tokens > config.text_config.vocab_size:
        model.resize_token_embeddings(num_tokens, pad_to_multiple_of=ROW_MULTIPLE, mean_resizing=False)
    model.config.use_cache = False
    return model


def _read_weights(path: str, config: Any, dtype: torch.dtype, attention: str) -> Any:
    """The stock model with all its weights from `path`: transformers itself would draw missing ones at random."""
    check_weights(path)
    try:
        model, info = family_of(config).model.from_pretrained(
            path, config=config, dtype=dtype, attn_implementation=attention, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"model.path: the weights at '{path}' cannot be read ({first_line(error)})") from error
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"model.path: '{path}' lacks {len(missing)} weights, the first {missing[0]}")
    return model


def prepare_student(model: Any, settings: ModelConfig) -> None:
    """Mark the trained weights; add adapters and activation checkpointing where the settings ask for them."""
    model.requires_grad_(True)
    if settings.lora_rank:
        model.requires_grad_(False)
        add_adapters(model.model.language_model, settings)
    if settings.activation_checkpointing != "none":
        model.gradient_checkpointing_enable(checkpoint_arguments(settings.activation_checkpointing))
    model.train()


def build_text_model(config: Any, attention: str) -> Any:
    """A language model of the student's shape without weights of its own: the teacher's.

    config: the language model's.
    """
    return family_of(config).text_model._from_config(config, attn_implementation=attention)


def detach_tower(model: Any, gather: Gather) -> nn.Module:
    """Take the vision tower out of `model` and return it whole, frozen and in evaluation mode.

    A frozen tower needs no engine: one plain copy per device (1.3 GB in bf16 at 7B) saves gathering it for every
    forward, and its call is free of collectives, so that ranks may have different numbers of images.
    """
    tower: nn.Module = model.model.visual
    with gather(list(tower.parameters())):
        for module in tower.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(parameter.detach().clone(), requires_grad=False))
    model.model.visual = None
    return tower.eval()
