"""The vision tower by itself: loaded without the language model, and identified by what its features depend on."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from ilvr_ds.config import ModelConfig
from ilvr_ds.data.images import ImageEncoder
from ilvr_ds.errors import UserError
from ilvr_ds.model.base_weights import tower_weights
from ilvr_ds.model.families import family_of
from ilvr_ds.model.layers.attention import attention_backend, use_varlen_attention
from ilvr_ds.model.layers.fused import check_kernels, use_fused_kernels
from ilvr_ds.model.student import load_config
from ilvr_ds.model.vision import VisionTower


def tower_identity(settings: ModelConfig, images: ImageEncoder) -> dict[str, Any]:
    """All that an image's features depend on, by name; reads the tower's weights (1.3 GB at 7B).

    Raises UserError where the model has no stored weights.
    """
    known = tower_settings(settings, images)
    digest = hashlib.sha256()
    for name, tensor in sorted(tower_weights(settings)):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        # as float32, so that an exact copy in another precision counts as the same
        digest.update(tensor.detach().float().numpy().astype("<f4", copy=False).tobytes())
    return {"tower": digest.hexdigest(), **known}


def tower_settings(settings: ModelConfig, images: ImageEncoder) -> dict[str, Any]:
    """What of `tower_identity` is known without the tower's weights."""
    config = load_config(settings.path)
    return {
        **{f"tower.{key}": getattr(config.vision_config, key) for key in family_of(config).tower_settings},
        **{f"images.{key}": value for key, value in images.settings.items()},
    }


def load_tower(settings: ModelConfig, images: ImageEncoder, dtype: torch.dtype, device: torch.device) -> VisionTower:
    """The tower of the model at `settings.path`, frozen, in `dtype` on `device`; no other weights are read.

    Raises UserError where the weights do not fit the configuration, or `model.kernels` asks for a missing package.
    """
    check_kernels(settings.kernels)
    config = load_config(settings.path)
    attention = attention_backend(settings.attention, dtype)
    tower: Any = family_of(config).tower
    tower = tower._from_config(config.vision_config, attn_implementation=attention)
    try:
        tower.load_state_dict({name.removeprefix("visual."): tensor for name, tensor in tower_weights(settings)})
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"model.path: the vision tower at '{settings.path}' does not load ({reason[:300]})") from error
    tower.requires_grad_(False).eval()
    for parameter in tower.parameters():  # not the buffers: rotary frequencies stay float32, as they do in training
        parameter.data = parameter.data.to(dtype)
    use_varlen_attention(tower, device, dtype)
    use_fused_kernels(tower, settings.kernels, device, dtype)
    return VisionTower(tower, images.mean, images.std).to(device)
