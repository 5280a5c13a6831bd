"""Attention over keys and values that were made piece by piece, each kept in memory once.

Latents that feed back into the student make its pass sequential: every latent slot attends to all that stood before
it. Stock caches concatenate the keys anew in each call, and autograd keeps every concatenation (with grouped heads
repeated, where the attention repeats them): M * K copies of the whole context. Here autograd keeps the pieces, which
all calls share, and a backward concatenates them again.

Letters: B rows, H heads of queries, G of keys and values, Q queries, P keys, d.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

NAME = "sdpa_over_pieces"
Pieces = tuple[Tensor, ...]


def use_cached_attention(language_model: Any) -> None:
    """Switch a language model to this attention: its layers must then be called with a `PiecewiseCache`."""
    AttentionInterface.register(NAME, _attention_over_pieces)
    language_model.config._attn_implementation = NAME


class PiecewiseCache:
    """What a stock attention layer takes for its cache in one call: earlier pieces, and then the call's own.

    It is not changed by what follows, so that a call can be repeated with the same result (activation checkpointing).
    """

    def __init__(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        self.keys: Pieces = tuple(keys)
        self.values: Pieces = tuple(values)

    def update(self, keys: Tensor, values: Tensor, *_: Any) -> tuple[Pieces, Pieces]:
        """Add the call's keys and values [B, G, Q, d] and return all pieces for the attention function."""
        self.keys, self.values = (*self.keys, keys), (*self.values, values)
        return self.keys, self.values


def _attention_over_pieces(
    module: Any,
    query: Tensor,
    keys: Pieces,
    values: Pieces,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """query [B, H, Q, d] -> [B, Q, H, d]; transformers' interface of attention functions."""
    output: Tensor = _Attention.apply(query, attention_mask, scaling, *keys, *values)  # type: ignore[no-untyped-call]
    return output.transpose(1, 2).contiguous(), None


class _Attention(torch.autograd.Function):
    """Keeps query, mask and pieces; the backward computes the attention once more."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, mask: Tensor | None, scaling: float, *pieces: Tensor) -> Tensor:
        ctx.save_for_backward(query, mask, *pieces)
        ctx.scaling = scaling
        return _attend(query, *_joined(pieces), mask, scaling)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, mask, *pieces = ctx.saved_tensors
        q, k, v = (tensor.detach().requires_grad_() for tensor in (query, *_joined(pieces)))
        with torch.enable_grad():
            output = _attend(q, k, v, mask, ctx.scaling)
        of_query, *of_joined = torch.autograd.grad(output, (q, k, v), grads)
        lengths = [piece.shape[2] for piece in pieces[: len(pieces) // 2]]
        of_keys, of_values = (torch.split(joined, lengths, dim=2) for joined in of_joined)
        return of_query, None, None, *of_keys, *of_values


def _joined(pieces: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Keys and values [B, G, P, d] of the keys' pieces and then the values'."""
    half = len(pieces) // 2
    return torch.cat(list(pieces[:half]), dim=2), torch.cat(list(pieces[half:]), dim=2)


def _attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """query [B, H, Q, d], keys and values [B, G, P, d], mask [B, 1, Q, P] bool -> [B, H, Q, d]; causal without a mask.

    With one query the heads of a group stand as the group's queries, so that its keys need not be repeated. A mask
    rules out kernels that know groups, so that a longer text repeats them.
    """
    H, G, Q = query.shape[1], keys.shape[1], query.shape[2]
    if Q == 1 and mask is not None:
        grouped = query.view(query.shape[0], G, H // G, query.shape[3])
        return scaled_dot_product_attention(grouped, keys, values, mask, scale=scaling).view_as(query)
    if mask is not None:
        keys, values = (x.repeat_interleave(H // G, dim=1) for x in (keys, values))
        return scaled_dot_product_attention(query, keys, values, mask, scale=scaling)
    return scaled_dot_product_attention(query, keys, values, is_causal=True, scale=scaling, enable_gqa=G < H)
