"""What a model has read so far while it answers: its KV cache, masks and positions.

B rows, T prompt tokens (padded on the left), D hidden size.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache

from ilvr_ds.data.template import EncodedSample
from ilvr_ds.data.window import TokenBatch, Window
from ilvr_ds.generation.loading import Reasoner
from ilvr_ds.model.families import family_of
from ilvr_ds.model.injection import added_rows, last_hidden, write_images


class Context:
    """Of a batch of prompts, to which tokens are added one by one."""

    def __init__(self, reasoner: Reasoner, prompts: list[EncodedSample], room: int) -> None:
        self.reasoner = reasoner
        self.language_model = reasoner.model.model.language_model
        self.family = family_of(self.language_model.config)
        self.embed = reasoner.model.get_input_embeddings()
        self.window = reasoner.collate(prompts)
        self.tokens: TokenBatch = self.window.micro_batches[0].tokens
        self.cache: Any = DynamicCache(config=self.language_model.config)
        self.length = self.tokens.real.shape[1]
        self.position = self.tokens.position_ids[:, :, -1:]  # a prompt ends in text: its last position is the largest
        padding = (0, room)
        self.real = torch.nn.functional.pad(self.tokens.real, padding, value=True)
        self._prefilled: Tensor | None = None

    def prefill(self) -> Tensor:
        """Read images and prompts, once; the last hidden state [B, D]."""
        if self._prefilled is None:
            features = self.reasoner.tower(self.window.images[0])
            embeddings = write_images(self.embed(self.tokens.input_ids), self.tokens, features)
            self._prefilled = last_hidden(self.language_model, self.tokens, embeddings, self.cache, features)[:, -1]
        return self._prefilled

    def fork(self) -> Context:
        """A context that reads on from the prompts by itself, and shares their keys and values with this one."""
        self.prefill()
        other = copy.copy(self)
        other.cache = copy.copy(self.cache)
        other.cache.layers = [copy.copy(layer) for layer in self.cache.layers]  # new tokens make new tensors
        return other

    def step(self, tokens: Tensor, latents: Tensor, hidden_from_it: Tensor | None = None) -> Tensor:
        """Read one token [B] of each row, a latent where it is latent_pad; the last hidden state [B, D].

        hidden_from_it [B, T]: columns of the prompts that it cannot see.
        """
        is_latent = (tokens == self.reasoner.special.latent_pad)[:, None]
        self.length += 1
        self.position = self.position + 1
        embeddings = torch.where(is_latent, latents, self.embed(tokens))
        output = self.language_model(
            inputs_embeds=embeddings[:, None],
            position_ids=self.position,
            attention_mask=self.family.mask_argument(self._mask(hidden_from_it)),
            past_key_values=self.cache,
            use_cache=True,
        )
        return cast(Tensor, output.last_hidden_state)[:, -1]

    def read(self, more: Window) -> Tensor:
        """Read several tokens at once, with their image, after rows of one length; the last hidden state [B, D]."""
        tokens = more.micro_batches[0].tokens
        features = self.reasoner.tower(more.images[0])
        embeddings = write_images(self.embed(tokens.input_ids), tokens, features)
        added = added_rows(self.language_model, tokens, features)
        count = embeddings.shape[1]
        positions = self.position + 1 + tokens.position_ids
        mask = torch.ones(count, self.length + count, dtype=torch.bool, device=embeddings.device).tril(self.length)
        is_flash = "flash" in self.language_model.config._attn_implementation
        output = self.language_model(
            inputs_embeds=embeddings,
            position_ids=positions,
            attention_mask=self.family.mask_argument(None if is_flash else mask[None, None]),
            past_key_values=self.cache,
            use_cache=True,
            **self.family.added_arguments(self.language_model, tokens.image_slots, added),
        )
        self.length, self.position = self.length + count, positions[:, :, -1:]
        return cast(Tensor, output.last_hidden_state)[:, -1]

    def _mask(self, hidden_from_it: Tensor | None) -> Tensor | None:
        """Ready-made, so that transformers need not look at values on the device."""
        if self.tokens.right_padded and hidden_from_it is None:
            return None  # no padding at all
        real = self.real[:, : self.length]
        if hidden_from_it is not None:
            real = real & ~torch.nn.functional.pad(hidden_from_it, (0, self.length - hidden_from_it.shape[1]))
        return real if "flash" in self.language_model.config._attn_implementation else real[:, None, None]
