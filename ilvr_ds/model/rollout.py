"""The student's own latents: each latent slot reads the last hidden state before it.

One pass over the tokens, not one for every slot: texts run in parallel, latent slots one after the other for all rows
together, both on the keys and values that came before. Samples are aligned by segment (`RolloutLayout`).

`roll_out` has gradients through the whole chain; `own_latents` has none, and gives what another forward then reads.

Letters: B samples, R rows of T tokens (a row each, or all in one), U columns of the layout, X segments, K latent slots,
C columns of a call, D.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ilvr_ds.data.rollout import RolloutLayout
from ilvr_ds.data.window import TokenBatch
from ilvr_ds.model.families import family_of
from ilvr_ds.model.injection import added_rows
from ilvr_ds.model.latent_pass import LatentPass, LatentPasses
from ilvr_ds.model.layers.cached_attention import CachedCall, LayerMemory


def roll_out(
    language_model: Any,
    embeddings: Tensor,
    tokens: TokenBatch,
    layout: RolloutLayout,
    latent_size: int,
    checkpointing: bool,
    latent_passes: LatentPasses | None = None,
    features: Tensor | None = None,
) -> Tensor:
    """Last hidden state after the final norm [B, T, D] of embeddings [B, T, D], a row each, with images written in.

    The language model must use `use_cached_attention`. Its layers are called (rounds + 1) + rounds * K times, whatever
    the rows hold: empty columns are computed and seen by nobody. checkpointing: text is computed again in the backward,
    layer by layer, so that of each layer only its input, its keys and its values are kept. latent_passes: what computes
    the passes of latent slots in place of one call after the other. features: as for `last_hidden`.
    """
    inputs = embeddings.flatten(0, 1)[layout.source]
    stack = _Stack.over(language_model, inputs, tokens, layout, latent_passes, features)
    outputs: list[Tensor] = []
    for number in range(layout.rounds):
        text, states = stack.segment(inputs, layout, number, latent_size, checkpointing)
        outputs += [text, *states[1:]]
    outputs.append(stack(inputs[:, stack.width :], checkpointing))
    hidden = torch.cat(outputs, dim=1)  # empty rounds too: their part of the backward must run on every rank
    return hidden.gather(1, layout.place[..., None].expand(-1, -1, hidden.shape[2]))


@torch.no_grad()
def own_latents(
    language_model: Any,
    embeddings: Tensor,
    tokens: TokenBatch,
    layout: RolloutLayout,
    latent_size: int,
    latent_passes: LatentPasses | None = None,
    features: Tensor | None = None,
) -> Tensor:
    """What `roll_out` feeds the latent slots, [X, K, D] in the order of `layout.slots`, for rows of any kind [R, T, D].

    To be called inside `cached_attention`. The layers are called rounds * (K + 1) times: nothing needs the last texts.
    """
    inputs = embeddings.flatten(0, 1)[layout.source]
    stack = _Stack.over(language_model, inputs, tokens, layout, latent_passes, features)
    fed = inputs.new_zeros(layout.rounds, len(inputs), latent_size, inputs.shape[2])
    for number in range(layout.rounds):
        _, states = stack.segment(inputs, layout, number, latent_size, checkpointing=False)
        fed[number] = torch.cat(states[:-1], dim=1)
    return fed[layout.turns, layout.rows]


class _Stack:
    """The decoder layers on column after column, with the keys and values of all earlier ones."""

    def __init__(
        self,
        language_model: Any,
        positions: tuple[Tensor, Tensor],
        real: Tensor,
        passes: LatentPass | None,
        images: tuple[Tensor, ...],
        image_slots: Tensor,
    ) -> None:
        self.add_rows = family_of(language_model.config).add_rows
        self.images = images
        """What is added behind each of the first layers at `image_slots`, flat positions in the first text"""
        self.image_slots = image_slots
        self.layers = language_model.layers
        self.norm = language_model.norm
        self.positions = positions
        self.real = real
        self.passes = passes
        self.memories = passes.memories() if passes else [LayerMemory(real.shape[1]) for _ in self.layers]
        self.done: list[Tensor | None] = [None for _ in self.layers]
        self.width = 0
        """Columns so far."""

    @staticmethod
    def over(
        language_model: Any,
        inputs: Tensor,
        tokens: TokenBatch,
        layout: RolloutLayout,
        latent_passes: LatentPasses | None,
        features: Tensor | None,
    ) -> _Stack:
        """At the first column of inputs [B, U, D]."""
        positions = language_model.rotary_emb(inputs, tokens.position_ids.flatten(1)[:, layout.source])
        passes = latent_passes.begin(positions, layout.real) if latent_passes and layout.rounds else None
        images = added_rows(language_model, tokens, features)
        return _Stack(language_model, positions, layout.real, passes, images, layout.image_slots)

    def segment(
        self, inputs: Tensor, layout: RolloutLayout, number: int, latent_size: int, checkpointing: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """The text up to segment `number` and the segment: the text's states [B, C, D], and K + 1 of [B, 1, D], that at
        latent_start and then those at the slots: each slot is fed the one before."""
        text = self(inputs[:, self.width : self.width + layout.chunks[number]], checkpointing)
        states = [text[torch.arange(len(inputs), device=inputs.device), layout.openings[number]][:, None]]
        for _ in range(latent_size):
            states.append(self.step(states[-1]))
        return text, states

    def __call__(self, hidden: Tensor, checkpointing: bool) -> Tensor:
        """Run the next C columns [B, C, D] through all layers and the final norm."""
        first, last = self.width, self.width + hidden.shape[1]
        mask = self._mask(first, last, hidden.dtype)
        cos, sin = (x[..., first:last, :] for x in self.positions)
        for number, (layer, memory) in enumerate(zip(self.layers, self.memories, strict=True)):
            arguments = (layer, hidden, mask, (cos, sin), memory, first, self.done[number])
            hidden, self.done[number] = _again_in_backward(_call, *arguments) if checkpointing else _call(*arguments)
            if first == 0 and number < len(self.images):  # images stand before the first segment
                hidden = self.add_rows(hidden, self.image_slots, self.images[number])
        self.width = last
        return cast(Tensor, self.norm(hidden))

    def step(self, hidden: Tensor) -> Tensor:
        """Run one column [B, 1, D]: a latent slot. These are few, and keep all they compute or only their input."""
        if self.passes is None:
            return self(hidden, checkpointing=False)
        hidden, done = self.passes(hidden, self.width, self.done)
        self.done = [done for _ in self.layers]
        self.width += 1
        return hidden

    def _mask(self, first: int, last: int, dtype: torch.dtype) -> Tensor | None:
        """[B, 1, C, last], what is added to scores: 0 for columns that columns [first, last) see, -inf for others; None
        for the first text, which is causal. Made once for all layers, and its lines begin where kernels want them to.

        The first chunk needs none because its empty columns stand behind its tokens. No line is empty: every row has
        tokens in the first chunk.
        """
        if first == 0:
            return None
        column = torch.arange(last, device=self.real.device)
        is_seen = self.real[:, None, None, :last] & (column <= column[first:, None])
        aligned = torch.zeros(*is_seen.shape[:3], -(-last // 16) * 16, device=is_seen.device, dtype=dtype)
        return aligned[..., :last].masked_fill_(~is_seen, float("-inf"))


def _call(
    layer: Any,
    hidden: Tensor,
    mask: Tensor | None,
    positions: tuple[Tensor, Tensor],
    memory: LayerMemory,
    first: int,
    after: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """One layer on columns `first` and following, [B, C, D]: its output, and what its next call comes after."""
    cache = CachedCall(memory, first, after)
    output = layer(hidden, attention_mask=mask, position_embeddings=positions, past_key_values=cache)
    return output, cache.done


def _again_in_backward(call: Callable[..., Any], *arguments: Any) -> tuple[Tensor, Tensor | None]:
    """`call(*arguments)`, which draws no random numbers, keeping only its arguments and results."""
    result: tuple[Tensor, Tensor | None] = checkpoint(call, *arguments, use_reentrant=False, preserve_rng_state=False)
    return result
