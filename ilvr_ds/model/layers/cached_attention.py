"""Attention over keys and values that are made call by call, each kept in memory once, with their gradients.

Latents that feed back into the student make its pass sequential: every latent slot attends to all that stood before
it. Stock caches concatenate the keys anew in each call, and autograd keeps every concatenation (with grouped heads
repeated, where the attention repeats them): M * K copies of the whole context. Here a layer's keys and values of all
columns stand in one buffer, and so do their gradients in the backward, to which each call adds.

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
    """The same inside the block alone, for calls without a backward: checkpointed layers would drop their cache."""
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

    held, grads: where both stand, the latter zero; by default memory of its own.
    """

    def __init__(self, columns: int, held: Tensor | None = None, grads: Tensor | None = None) -> None:
        self.columns = columns
        self._held = held
        self._grads = grads

    def write(self, keys: Tensor, values: Tensor, first: int) -> None:
        """Put [B, G, C, d] of a call at columns `first` and following; again the same when a call is repeated."""
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
        """The sums [B, G, C, d] of columns first to last, to which nobody adds any more."""
        assert self._grads is not None, "taken before anything was added"
        of_keys, of_values = self._grads[:, :, :, first:last]
        if first == 0:  # the last call of a backward; another backward begins at zero
            self._grads = None
        return of_keys, of_values


class FixedMemory(LayerMemory):
    """The same for calls of one column that a device is to repeat as they were recorded: which column it is stands in
    its memory, column [1] int64, and all U are looked at, so that the mask must rule out what is not there."""

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
    """What a stock attention layer takes for its cache in one call.

    after: what the layer's call before this one left in `done`, None in the first. Through these the backward knows
    its order: it comes to a call when all later ones have added what they owe to the call's keys and values.
    """

    def __init__(self, memory: LayerMemory, first: int, after: Tensor | None) -> None:
        self.memory = memory
        self.first = first
        self.after = after
        self.done: Tensor | None = None

    def update(self, keys: Tensor, values: Tensor, *_: Any) -> tuple[Any, Any]:
        """Take the call's keys and values [B, G, C, d]; this call goes on to the attention function in their place."""
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
    """Keeps query and mask, and the columns in memory; the backward computes the attention once more."""

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
        ctx.rest = scaling, memory, first, first + keys.shape[2]
        return _attend(query, *memory.read(first + keys.shape[2]), mask, scaling), query.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, mask = ctx.saved_tensors
        scaling, memory, first, last = ctx.rest
        q, k, v = (tensor.detach().requires_grad_() for tensor in (query, *memory.read(last)))
        with torch.enable_grad():
            output = _attend(q, k, v, mask, scaling)
        of_query, *of_columns = torch.autograd.grad(output, (q, k, v), grads[0])
        memory.add_grads(*of_columns)
        return of_query, *memory.take_grads(first, last), None, None, None, None, None


def _attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """query [B, H, C, d], keys and values [B, G, P, d], mask [B, 1, C, P] -> [B, H, C, d]; causal without a mask, which
    is added to the scores.

    With one query the heads of a group stand as the group's queries, so that its keys need not be repeated. A mask
    rules out kernels that know groups, so that a longer text repeats them.
    """
    H, G, C = query.shape[1], keys.shape[1], query.shape[2]
    if C == 1 and mask is not None:
        grouped = query.view(query.shape[0], G, H // G, query.shape[3])
        return scaled_dot_product_attention(grouped, keys, values, mask, scale=scaling).view_as(query)
    if mask is not None:
        keys, values = (x.repeat_interleave(H // G, dim=1) for x in (keys, values))
        return scaled_dot_product_attention(query, keys, values, mask, scale=scaling)
    return scaled_dot_product_attention(query, keys, values, is_causal=True, scale=scaling, enable_gqa=G < H)
