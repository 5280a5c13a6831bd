"""Fused kernels in place of the stock layers' chains of small ones: norms, gated activations, rotations.

Each reads and writes its operands once where the stock layer does it up to a dozen times, and keeps less for the
backward. Norms are PyTorch's own; the gated activation and the rotations are Liger's, where that package is installed.
All compute in float32 inside. Weights, names and files stay those of the stock layers.
"""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from ilvr_ds.errors import UserError
from ilvr_ds.model.families import family_of

ALIGNMENT = 64
"""A tower's gated layers are widened to a multiple of this. Qwen2.5-VL's have 3420 columns, no multiple of 8, for which
cuBLAS falls back to kernels of an older chip."""

SILU = type(ACT2FN["silu"])


def check_kernels(wanted: str) -> None:
    """Raise UserError where `model.kernels` asks for a package that is not there."""
    if wanted == "liger" and not has_liger():
        raise UserError("model.kernels is liger: needs liger-kernel; pip install liger-kernel")


def has_liger() -> bool:
    """Whether Liger's kernels are installed."""
    return find_spec("liger_kernel") is not None


def use_fused_kernels(network: Any, wanted: str, device: torch.device, dtype: torch.dtype) -> None:
    """Switch a language model or a vision tower to fused kernels, on a GPU in 16 bit.

    wanted: `model.kernels`; stock changes nothing. Rotations are replaced for the whole process, and fall back to the
    stock ones on other devices and dtypes.
    """
    if wanted == "stock" or device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return
    family, with_liger = family_of(network.config), has_liger()
    for module in network.modules():
        if isinstance(module, family.norms):
            module.forward = MethodType(_norm, module)
        elif with_liger and isinstance(module, family.gated) and isinstance(module.act_fn, SILU):
            module.forward = MethodType(_gated, module)
    if isinstance(network, family.tower):
        widen_gated_layers(network)
    if with_liger:
        stock: Any = family.modeling
        stock.apply_rotary_pos_emb = partial(_fused_rotate, family.rotate)
        stock.apply_rotary_pos_emb_vision = partial(_fused_rotate_vision, family.rotate_vision)


def kernels_in_words(network: nn.Module) -> str:
    """Which kernels a network computes with, for logs."""
    forwards = {getattr(module.forward, "__func__", None) for module in network.modules()}
    if _norm not in forwards:
        return "transformers' own"
    return "fused norms, activations and rotations" if _gated in forwards else "fused norms"


@torch.no_grad()
def widen_gated_layers(tower: Any) -> None:
    """Widen a frozen tower's gated layers with zeros to a multiple of ALIGNMENT: what comes out stays the same."""
    kinds = family_of(tower.config).gated
    layers: list[Any] = [module for module in tower.modules() if isinstance(module, kinds)]
    for layer in layers:
        extra = -layer.gate_proj.weight.shape[0] % ALIGNMENT
        for linear in (layer.gate_proj, layer.up_proj):
            linear.weight = _frozen(nn.functional.pad(linear.weight, (0, 0, 0, extra)))
            if linear.bias is not None:
                linear.bias = _frozen(nn.functional.pad(linear.bias, (0, extra)))
        layer.down_proj.weight = _frozen(nn.functional.pad(layer.down_proj.weight, (0, extra)))


def _frozen(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=False)


def _norm(self: Any, hidden_states: Tensor) -> Tensor:
    return nn.functional.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)


def _gated(self: Any, x: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_swiglu

    product: Tensor = self.down_proj(liger_swiglu(self.gate_proj(x), self.up_proj(x)))
    return product


def _fused_rotate(
    stock: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """q [B, heads, T, d], k [B, key-value heads, T, d], cos and sin [B, T, d]; `stock` takes what cannot be fused."""
    if not _is_fusible(q) or unsqueeze_dim != 1:
        return cast(tuple[Tensor, Tensor], stock(q, k, cos, sin, unsqueeze_dim))
    if torch.is_grad_enabled():
        # the kernel writes to its operands, which selective checkpointing has saved
        q, k = q.clone(), k.clone()
    return _liger_rope(q, k, cos, sin)


def _fused_rotate_vision(stock: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q and k [patches, heads, d], cos and sin [patches, d] float32; without gradients."""
    if not _is_fusible(q) or torch.is_grad_enabled():
        return cast(tuple[Tensor, Tensor], stock(q, k, cos, sin))
    q, k = (x.clone(memory_format=torch.contiguous_format)[None].transpose(1, 2) for x in (q, k))
    q, k = _liger_rope(q, k, cos[None].float(), sin[None].float())
    return q[0].transpose(0, 1), k[0].transpose(0, 1)


def _liger_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    from liger_kernel.transformers.functional import liger_rope

    return cast(tuple[Tensor, Tensor], liger_rope(q, k, cos, sin))


def _is_fusible(x: Tensor) -> bool:
    return x.is_cuda and x.dtype in (torch.float16, torch.bfloat16)
