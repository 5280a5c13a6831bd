"""Where the tokens of an answer look: shares of attention on latents, images and text, layer by layer.

T tokens, H heads, G heads of keys, d.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from ilvr_ds.data.template import EncodedSample
from ilvr_ds.generation.answers import Answer
from ilvr_ds.generation.loading import Reasoner
from ilvr_ds.model.injection import last_hidden, write_images

NAME = "ilvr_ds_shares"
SAMPLES = 16
"""Samples that are looked at: what of their tokens is asked about has its attention written out."""
COLUMNS = ("latents", "images", "text")


@torch.inference_mode()
def attention_shares(reasoner: Reasoner, prompt: EncodedSample, answer: Answer) -> list[list[float]] | None:
    """[layers][latents, images, text]: of the attention of the tokens behind the answer's last segment, mean over
    heads and tokens. None where no token is behind a segment."""
    special, prompt_length = reasoner.special, len(prompt.input_ids)
    whole = prompt.followed_by(answer.tokens)
    ids = whole.input_ids
    ends = np.flatnonzero(ids == special.latent_end)
    if not len(ends) or ends[-1] + 1 >= len(ids):
        return None
    window = reasoner.collate([whole])
    tokens, model = window.micro_batches[0].tokens, reasoner.model
    embeddings = model.get_input_embeddings()(tokens.input_ids)
    features = reasoner.tower(window.images[0])
    embeddings = write_images(embeddings, tokens, features)
    slots = np.flatnonzero(ids == special.latent_pad)
    latents = torch.cat(answer.latents).to(embeddings)
    embeddings[0, torch.from_numpy(slots).to(embeddings.device)] = latents
    kinds = np.full(len(ids), COLUMNS.index("text"))
    kinds[slots] = COLUMNS.index("latents")
    kinds[:prompt_length][prompt.input_ids == special.image_pad] = COLUMNS.index("images")
    asked = torch.arange(int(ends[-1]) + 1, len(ids), device=embeddings.device)
    shares = _Shares(asked, torch.from_numpy(kinds).to(embeddings.device))
    language_model = model.model.language_model
    before = language_model.config._attn_implementation
    AttentionInterface.register(NAME, shares)
    language_model.config._attn_implementation = NAME
    try:
        last_hidden(language_model, tokens, embeddings, features=features)
    finally:
        language_model.config._attn_implementation = before
    return shares.layers


class _Shares:
    """An attention that notes what some queries look at."""

    def __init__(self, asked: Tensor, kinds: Tensor) -> None:
        self.asked = asked
        self.kinds = torch.nn.functional.one_hot(kinds, len(COLUMNS)).float()
        self.layers: list[list[float]] = []

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
        scaling: float | None = None, **_: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        """query [1, H, T, d], key and value [1, G, T, d], of one sequence without padding -> [1, T, H, d]."""
        T, groups = query.shape[2], query.shape[1] // key.shape[1]
        later = torch.arange(T, device=query.device) > self.asked[:, None]
        asked, keys = query[:, :, self.asked], key.repeat_interleave(groups, dim=1)
        logits = (asked @ keys.transpose(2, 3)).float() * (scaling or query.shape[-1] ** -0.5)
        weights = logits.masked_fill(later, -torch.inf).softmax(-1)
        self.layers.append((weights[0].mean((0, 1)) @ self.kinds).tolist())
        read = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=groups > 1)
        return read.transpose(1, 2).contiguous(), None
