"""Prompts, read: what decoding goes on from. Images go through the tower together, prompts through the layers together.

Letters: B prompts, T tokens of the longest, G heads of keys and values of d numbers, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from ilvr_ds.data.template import EncodedSample
from ilvr_ds.data.window import TokenBatch
from ilvr_ds.generation.context import Context
from ilvr_ds.generation.loading import Reasoner
from ilvr_ds.model.injection import last_hidden, write_images

TOKENS_AT_ONCE = 32768
"""Of all prompts of a pass, padding included: more make no pass faster, but need more memory."""


@dataclass(frozen=True)
class Prefilled:
    """B prompts, each from column 0 on; what stands behind a prompt's end means nothing."""

    hidden: Tensor
    """[B, D] at the last token"""
    keys_and_values: list[tuple[Tensor, Tensor]]
    """Of each layer, [B, T, G, d]"""
    lengths: Tensor
    """[B] int64"""
    position: Tensor
    """[B] int64 of the last token"""
    image: Tensor
    """[B, T] bool: image tokens"""
    prompt: Tensor
    """[B, T] bool: all tokens"""

    @property
    def columns(self) -> int:
        """T"""
        return self.prompt.shape[1]


def read_prompts(reasoner: Reasoner, prompts: list[EncodedSample]) -> Prefilled:
    """All in one pass, padded behind: then a causal model needs no mask."""
    window = reasoner.collate(prompts, "right")
    tokens = window.micro_batches[0].tokens
    language_model = reasoner.model.model.language_model
    cache = DynamicCache(config=language_model.config)
    features = reasoner.tower(window.images[0])
    embeddings = write_images(reasoner.model.get_input_embeddings()(tokens.input_ids), tokens, features)
    hidden = last_hidden(language_model, tokens, embeddings, cache, features)
    return _laid_out(reasoner, tokens, hidden, cache, shift=None)


def read_already(context: Context) -> Prefilled:
    """The prompts of a context, which stand at the right."""
    hidden = context.prefill()[:, None].expand(-1, context.tokens.real.shape[1], -1)
    T = context.tokens.real.shape[1]
    lengths = context.tokens.real.sum(1)
    shift = (torch.arange(T, device=lengths.device) + (T - lengths)[:, None]).clamp(max=T - 1)
    return _laid_out(context.reasoner, context.tokens, hidden, context.cache, shift)


def _laid_out(
    reasoner: Reasoner, tokens: TokenBatch, hidden: Tensor, cache: DynamicCache, shift: Tensor | None
) -> Prefilled:
    """shift [B, T]: the column that column t comes from; None: they stand where they should."""
    T = tokens.real.shape[1]
    lengths = tokens.real.sum(1)

    def moved(x: Tensor) -> Tensor:
        """[B, T, ...]"""
        if shift is None:
            return x
        return x.gather(1, shift.view(*shift.shape, *[1] * (x.dim() - 2)).expand_as(x))

    last = (lengths - 1)[:, None]
    ids, positions = moved(tokens.input_ids), moved(tokens.position_ids[0])
    return Prefilled(
        hidden=hidden.gather(1, last[..., None].expand(-1, -1, hidden.shape[2]))[:, 0],
        keys_and_values=[
            (moved(layer.keys[:, :, :T].transpose(1, 2)), moved(layer.values[:, :, :T].transpose(1, 2)))
            for layer in cache.layers
        ],
        lengths=lengths,
        position=positions.gather(1, last)[:, 0],
        image=ids == reasoner.special.image_pad,
        prompt=torch.arange(T, device=lengths.device) < lengths[:, None],
    )


def in_passes(prompts: list[EncodedSample]) -> Iterator[list[int]]:
    """Places of the prompts of each pass, by length, so that little of a pass is padding."""
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place].input_ids), reverse=True)
    while order:
        count = max(1, TOKENS_AT_ONCE // len(prompts[order[0]].input_ids))
        yield order[:count]
        order = order[count:]
