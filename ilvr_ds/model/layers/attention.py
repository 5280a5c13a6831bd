"""Selects the attention implementation, and adds two for sequences that lie end to end in one row.

Both are registered by name with transformers: PyTorch's variable-length attention, which needs no package, for the
windows of the vision tower and for packed rows of the language model; and SDPA sequence by sequence, for a CPU or
float32.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils import import_utils

from ilvr_ds.data.window import TokenBatch
from ilvr_ds.errors import UserError

VARLEN = "flash_varlen_torch"
"""Contains "flash": by that transformers recognises implementations that take all windows in one call."""
PIECEWISE = "sdpa_by_sequence"
_FLASH = ("flash_attention_2", "flash_attention_3", "flash_attention_4")
_DESCRIPTIONS = {VARLEN: "PyTorch's variable-length attention", PIECEWISE: "PyTorch's SDPA, sequence by sequence"}


def attention_backend(wanted: str, dtype: torch.dtype) -> str:
    """The implementation that transformers loads a model with: a flash-attn, or "sdpa".

    "auto" takes the first flash-attn that is installed and can compute in `dtype` (16 bit, on a GPU). Raises UserError
    where the one named cannot run.
    """
    can_flash = torch.cuda.is_available() and dtype in (torch.float16, torch.bfloat16)
    if wanted == "auto":
        return next((name for name in _FLASH if can_flash and _is_installed(name)), "sdpa")
    if wanted in _FLASH and not (can_flash and _is_installed(wanted)):
        raise UserError(
            f"model.attention is {wanted}: needs a GPU, train.precision bf16 or fp16, and the package; "
            "valid everywhere: auto, sdpa"
        )
    if wanted == "varlen":
        if not can_flash:
            raise UserError(
                "model.attention is varlen: needs a GPU and train.precision bf16 or fp16; valid everywhere: auto, sdpa"
            )
        return "sdpa"
    return wanted


def _is_installed(flash: str) -> bool:
    """Whether transformers knows, and finds, the version of flash-attn that the name ends in."""
    is_available = getattr(import_utils, f"is_flash_attn_{flash[-1]}_available", None)
    return is_available is not None and bool(is_available())


def use_varlen_attention(tower: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Switch a vision tower without flash-attn to variable-length attention, where device and dtype support it.

    The stock tower loops over its windows in Python unless its attention takes them all in one call.
    """
    config: Any = tower.config
    if _can_varlen(device, dtype) and "flash" not in config._attn_implementation:
        AttentionInterface.register(VARLEN, _varlen_attention)
        config._attn_implementation = VARLEN


def use_packed_attention(language_model: Any, wanted: str, device: torch.device, dtype: torch.dtype) -> None:
    """Prepare a language model for packed rows: its calls must then pass `sequence_bounds`.

    wanted: `model.attention`. A stock flash-attn needs no preparation.
    """
    if "flash" in language_model.config._attn_implementation:
        return
    is_varlen = wanted != "sdpa" and _can_varlen(device, dtype)
    AttentionInterface.register(VARLEN, _varlen_attention)
    AttentionInterface.register(PIECEWISE, _attention_by_sequence)
    language_model.config._attn_implementation = VARLEN if is_varlen else PIECEWISE


def sequence_bounds(language_model: Any, tokens: TokenBatch) -> dict[str, Any]:
    """Keyword arguments that tell attention where packed samples begin and end; none for rows of one sample each.

    Raises RuntimeError where the model's attention would ignore them, so that samples attend to each other.
    """
    if tokens.cu_seqlens is None:
        return {}
    name = language_model.config._attn_implementation
    if name != PIECEWISE and "flash" not in name:
        raise RuntimeError(f"packed rows, but the language model's attention is {name}: use_packed_attention first")
    longest = max(tokens.lengths)
    return {
        "cu_seq_lens_q": tokens.cu_seqlens,
        "cu_seq_lens_k": tokens.cu_seqlens,
        "max_length_q": longest,
        "max_length_k": longest,
        "sequence_lengths": tokens.lengths,
    }


def attention_in_words(network: Any) -> str:
    """A model's attention, for logs."""
    name: str = network.config._attn_implementation
    return _DESCRIPTIONS.get(name, name)


def _can_varlen(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cuda" and dtype in (torch.float16, torch.bfloat16)


def _varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seq_lens_q: Tensor,
    cu_seq_lens_k: Tensor,
    max_length_q: int,
    max_length_k: int,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """query [1, heads, tokens, d], key and value [1, key-value heads, tokens, d] -> [1, tokens, heads, d].

    No token attends across sequences, nor to later tokens where the module is causal.
    """
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    options: dict[str, Any] = {"scale": scaling, "window_size": (-1, 0) if module.is_causal else (-1, -1)}
    if _takes_enable_gqa():
        options["enable_gqa"] = q.shape[1] != k.shape[1]
    output = varlen_attn(q, k, v, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, **options)
    assert isinstance(output, Tensor)
    return output[None], None


@cache
def _takes_enable_gqa() -> bool:
    """torch 2.11 accepts grouped heads as they are, 2.13 requires `enable_gqa`."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def _attention_by_sequence(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    sequence_lengths: tuple[int, ...],
    **options: Any,
) -> tuple[Tensor, None]:
    """The same shapes; transformers' SDPA on each sequence alone, so that packing changes no bit of it."""
    pieces = zip(*(torch.split(x, list(sequence_lengths), dim=2) for x in (query, key, value)), strict=True)
    return torch.cat([sdpa_attention_forward(module, q, k, v, None, **options)[0] for q, k, v in pieces], dim=1), None
