"""Attention of the vision tower without a loop over windows, by PyTorch's own variable-length attention.

The stock tower walks through its windows in Python unless its attention is a flash implementation, which gets all
windows in one call. transformers lets a program register such an implementation by name; ours needs no package.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

NAME = "flash_varlen_torch"
"""Holds the word flash: that is how transformers recognises implementations that take all windows at once."""


def use_varlen_attention(tower: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Switch a tower to variable-length attention where the device and the dtype can do it (GPU, 16 bit)."""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return
    AttentionInterface.register(NAME, _varlen_attention)
    config: Any = tower.config
    config._attn_implementation = NAME


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
    **_: Any,
) -> tuple[Tensor, None]:
    """query, key, value [1, heads, patches, d] -> [1, patches, heads, d]; no attention across sequence boundaries."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    output = varlen_attn(q, k, v, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
    assert isinstance(output, Tensor)
    return output[None], None
