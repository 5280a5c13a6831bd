"""Activation checkpointing of decoder layers: the backward recomputes the whole layer, or only what is cheap."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.attention.varlen  # registers the operator
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

_aten: Any = torch.ops.aten
_own: Any = torch.ops.torch_attn
EXPENSIVE = frozenset(
    overload
    for operator in (
        _aten.mm,
        _aten.addmm,
        _aten.bmm,
        _aten._scaled_dot_product_flash_attention,
        _aten._scaled_dot_product_flash_attention_for_cpu,
        _aten._scaled_dot_product_efficient_attention,
        _aten._scaled_dot_product_cudnn_attention,
        _aten._flash_attention_forward,
        _aten._efficient_attention_forward,
        _own._varlen_attn,
    )
    for overload in (getattr(operator, name) for name in operator.overloads() if "out" not in name)
)
"""Matrix products and attention: nearly all of a layer's work, and 0.7 of what it saves (half, in a stock layer)."""
_BY_NAME = ("bitsandbytes.gemm", "flash_attn")
"""Expensive operators of packages, which exist once imported: products of 4-bit layers, and attention of flash-attn 2
and 3. Version 4 registers no operator: its attention is recomputed."""
KEPT = EXPENSIVE | {_aten.add_.Tensor}
"""DeepSpeed's linear function for ZeRO-3 adds the bias in place to the saved product, and recomputation would add it
again: wrong gradients without an error. engine/settings.py switches that function off; should it be active after all,
torch sees that a saved addition was changed, and refuses."""


def checkpoint_arguments(kind: str) -> dict[str, Any]:
    """Keyword arguments of torch.utils.checkpoint for each layer. kind: full or selective."""
    arguments: dict[str, Any] = {"use_reentrant": False}
    if kind == "selective":
        arguments["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    return arguments


def _policy(context: Any, operator: Any, *arguments: Any, **named: Any) -> CheckpointPolicy:
    """Recomputes norms, rotations and activation functions, which read and write little."""
    is_kept = operator in KEPT or str(operator).startswith(_BY_NAME)
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE
