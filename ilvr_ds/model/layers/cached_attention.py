"""Attention over a cache of keys and values that has a backward, and keeps each of them in memory once.

Latents that feed back into the student make its pass sequential: every latent slot attends to all that stood before
it. Stock caches concatenate the keys anew in each call, and autograd keeps every concatenation (with grouped heads
repeated, where the attention repeats them): M * K copies of the whole context. Here a layer has one buffer for the keys
and values of all columns, and one for their gradients, to which each call adds in the backward.

Letters: B rows, H heads of queries, G of keys and values, C columns of a call, P of it and all before it, U of the
whole layout, d.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

NAME = "sdpa_over_columns"


def use_cached_attention(language_model: Any) -> None:
    """Switch a language model to this attention: its layers must then be called with a `CachedCall`."""
    AttentionInterface.register(NAME, _attend_to_columns)
    language_model.config._attn_implementation = NAME


@contextmanager
def cached_attention(language_model: Any) -> Iterator[None]:
    """Use this attention inside the block only, for calls without a backward.

    Activation checkpointing is off inside: checkpointed layers drop their cache.
    """
    before = language_model.config._attn_implementation
    flags = [layer.gradient_checkpointing for layer in language_model.layers]
    use_cached_attention(language_model)
    for layer in language_model.layers:
        layer.gradient_checkpointing = False
    try:
        yield
    finally:
        language_model.config._attn_implementation = before
        for layer, flag in zip(language_model.layers, flags, strict=True):
            layer.gradient_checkpointing = flag


class LayerMemory:
    """Keys and values of one layer [2, B, G, U, d] and, in the backward, the sum of their gradients.

    held, grads: buffers for both, the latter zero; by default allocated when they are needed.
    """

    def __init__(self, columns: int, held: Tensor | None = None, grads: Tensor | None = None) -> None:
        self.columns = columns
        self._held = held
        self._grads = grads

    def write(self, keys: Tensor, values: Tensor, first: int) -> None:
        """Store a call's [B, G, C, d] at columns `first` and following; a recomputed call stores the same again."""
        if self._held is None:
            self._held = keys.new_empty(2, *keys.shape[:2], self.columns, keys.shape[3])
        for held, new in zip(self._held, (keys, values), strict=True):
            held[:, :, first : first + new.shape[2]] = new

    def read(self, last: int) -> tuple[Tensor, Tensor]:
        """Keys and values [B, G, last, d] of all columns before `last`."""
        assert self._held is not None, "read before the first write"
        keys, values = self._held[:, :, :, :last]
        return keys, values

    def add_grads(self, of_keys: Tensor, of_values: Tensor) -> None:
        """Add a call's gradients [B, G, P, d]."""
        if self._grads is None:
            assert self._held is not None
            self._grads = torch.zeros_like(self._held)
        for sums, grads in zip(self._grads, (of_keys, of_values), strict=True):
            sums[:, :, : grads.shape[2]] += grads

    def take_grads(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """The sums [B, G, C, d] of columns first to last, to which no call adds any more."""
        assert self._grads is not None, "taken before anything was added"
        of_keys, of_values = self._grads[:, :, :, first:last]
        if first == 0:  # the last call of a backward; another backward begins at zero
            self._grads = None
        return of_keys, of_values


class FixedMemory(LayerMemory):
    """LayerMemory for CUDA graphs, which call it for one column a time.

    column [1] int64 on the device says which. Attention reads all U columns: the mask must exclude those not in use.
    """

    def __init__(self, column: Tensor, held: Tensor, grads: Tensor | None) -> None:
        super().__init__(held.shape[3], held, grads)
        self.column = column

    def write(self, keys: Tensor, values: Tensor, first: int) -> None:
        """Put [B, G, 1, d] at `column`."""
        assert self._held is not None
        for held, new in zip(self._held, (keys, values), strict=True):
            held.index_copy_(2, self.column, new)

    def read(self, last: int) -> tuple[Tensor, Tensor]:
        """All columns."""
        return super().read(self.columns)

    def take_grads(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """The sums [B, G, 1, d] of `column`."""
        assert self._grads is not None
        of_keys, of_values = self._grads.index_select(3, self.column)
        return of_keys, of_values


class CachedCall:
    """The cache that a stock attention layer sees in one call.

    after: `done` of the layer's previous call, None in the first. This chain orders the backward: it reaches a call
    when all later ones have added their part to the gradients of its keys and values.
    """

    def __init__(self, memory: LayerMemory, first: int, after: Tensor | None) -> None:
        self.memory = memory
        self.first = first
        self.after = after
        self.done: Tensor | None = None

    def update(self, keys: Tensor, values: Tensor, *_: Any) -> tuple[Any, Any]:
        """Keep the call's keys and values [B, G, C, d]; the attention function receives this object in their place."""
        self.keys, self.values = keys, values
        return self, None


def _attend_to_columns(
    module: Any,
    query: Tensor,
    call: CachedCall,
    nothing: None,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """query [B, H, C, d] -> [B, C, H, d]; transformers' interface of attention functions."""
    output, call.done = _Attention.apply(  # type: ignore[no-untyped-call]
        query, call.keys, call.values, call.after, attention_mask, scaling, call.memory, call.first
    )
    return output.transpose(1, 2).contiguous(), None


class _Attention(torch.autograd.Function):
    """Saves query and mask; the backward computes the attention again, from the columns in memory."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        after: Tensor | None,
        mask: Tensor | None,
        scaling: float,
        memory: LayerMemory,
        first: int,
    ) -> tuple[Tensor, Tensor]:
        memory.write(keys, values, first)
        ctx.save_for_backward(query, mask)
        ctx.call = scaling, memory, first, first + keys.shape[2]
        return _attend(query, *memory.read(first + keys.shape[2]), mask, scaling), query.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, mask = ctx.saved_tensors
        scaling, memory, first, last = ctx.call
        q, k, v = (tensor.detach().requires_grad_() for tensor in (query, *memory.read(last)))
        with torch.enable_grad():
            output = _attend(q, k, v, mask, scaling)
        of_query, *of_columns = torch.autograd.grad(output, (q, k, v), grads[0])
        memory.add_grads(*of_columns)
        return of_query, *memory.take_grads(first, last), None, None, None, None, None


def _attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """query [B, H, C, d], keys and values [B, G, P, d], mask [B, 1, C, P] added to the scores -> [B, H, C, d].

    Causal without a mask. A single query has the heads of a group as the group's queries, so that keys need not be
    repeated; a longer text with a mask repeats them, because kernels that know groups take no mask.
    """
    H, G, C = query.shape[1], keys.shape[1], query.shape[2]
    if C == 1 and mask is not None:
        grouped = query.view(query.shape[0], G, H // G, query.shape[3])
        return scaled_dot_product_attention(grouped, keys, values, mask, scale=scaling).view_as(query)
    if mask is not None:
        keys, values = (x.repeat_interleave(H // G, dim=1) for x in (keys, values))
        return scaled_dot_product_attention(query, keys, values, mask, scale=scaling)
    return scaled_dot_product_attention(query, keys, values, is_causal=True, scale=scaling, enable_gqa=G < H)
