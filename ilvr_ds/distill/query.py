"""The teacher's context: for every sample what the user shows and asks, for every segment the text before it.

Letters: W samples of the window, T tokens, R prompt tokens, I image tokens, S text tokens before a segment, M segments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ilvr_ds.data.window import QueryContext, TokenBatch
from ilvr_ds.model.families import family_of
from ilvr_ds.model.injection import last_hidden, write_images

ATTENTION_ELEMENTS = 2**26
"""Most elements of the prompt-to-image attention that is computed at a time: of several samples, of one, or of some of
its prompt tokens."""


class Context(NamedTuple):
    """Parts of the queries, in float32."""

    user: Tensor
    """[W, D]"""
    step: Tensor
    """[M, D]: mean hidden state of the text before the segment; 0 where there is none"""
    has_step: Tensor
    """[M] bool"""


class ContextEncoder(nn.Module):
    """The teacher's network: its language model and what is read off it, in one forward of one root module.

    Every call makes the same module calls whatever the samples hold: under ZeRO-3 a call that one rank left out
    would deadlock the others.
    """

    def __init__(self, language_model: Any) -> None:
        super().__init__()
        self.language_model = language_model

    @torch.no_grad()
    def forward(
        self, tokens: TokenBatch, features: Tensor, context: QueryContext, pieces: Sequence[range] = ()
    ) -> Context:
        """Read the whole window, latent pads as plain token embeddings, images in place.

        pieces: successive samples that go through the model together, equally many pieces on all ranks; by default all
        samples at once.
        """
        pieces = pieces or (range(len(tokens.lengths)),)
        embeddings = self.language_model.embed_tokens(tokens.input_ids)
        hidden = self._hidden(tokens, write_images(embeddings, tokens, features), features, pieces)
        embeddings = embeddings.flatten(0, 1)
        steps = zip(context.step.tensor_split(len(pieces)), context.step_mask.tensor_split(len(pieces)), strict=True)
        return Context(
            user=torch.cat([self._user_context(hidden, embeddings, context.of(samples)) for samples in pieces]),
            step=torch.cat([_masked_mean(hidden[step], mask) for step, mask in steps]),
            has_step=context.step_mask.any(1),
        )

    def _hidden(self, tokens: TokenBatch, embeddings: Tensor, features: Tensor, pieces: Sequence[range]) -> Tensor:
        """Last hidden states [R * T, D]; the memory that the model needs inside is that of one piece."""
        if len(pieces) == 1:
            return last_hidden(self.language_model, tokens, embeddings, features=features).flatten(0, 1)
        hidden = torch.empty_like(embeddings)
        for samples in pieces:
            where = tokens.places(samples)
            part = tokens.of(samples)
            hidden[where] = last_hidden(self.language_model, part, embeddings[where], features=features)
        return hidden.flatten(0, 1)

    def _user_context(self, hidden: Tensor, embeddings: Tensor, context: QueryContext) -> Tensor:
        """(r_img + r_txt) / 2, where r_img weighs image states by how much the prompt attends to them.

        A sample without images has the mean input embedding of its prompt instead. Returns [W, D] float32.
        """
        text = _masked_mean(hidden[context.prompt], context.prompt_mask)
        weights = self._image_weights(hidden, context)
        image = torch.einsum("wi,wid->wd", weights, hidden[context.image].float())
        embedded = _masked_mean(embeddings[context.prompt], context.prompt_mask)
        return torch.where(context.image_mask.any(1)[:, None], (image + text) / 2, embedded)

    def _image_weights(self, hidden: Tensor, context: QueryContext) -> Tensor:
        """Attention of the prompt on the image tokens by the last layer's projections, without rotation: [W, I]."""
        attention, family = self.language_model.layers[-1].self_attn, family_of(self.language_model.config)
        W, R = context.prompt.shape
        I = context.image.shape[1]  # noqa: E741
        query = family.queries(attention, hidden[context.prompt])
        key = family.keys(attention, hidden[context.image])
        groups = query.shape[2] // key.shape[2]
        query = query.view(W, R, -1, groups, attention.head_dim)
        chunk = max(1, ATTENTION_ELEMENTS // (R * I * query.shape[2] * groups))
        chunks = [slice(start, start + chunk) for start in range(0, W, chunk)]
        parts = [
            _attention_mass(query[w], key[w], context.prompt_mask[w], context.image_mask[w], attention.head_dim**-0.5)
            for w in chunks
        ]
        return torch.cat(parts)


def _attention_mass(query: Tensor, key: Tensor, rows: Tensor, columns: Tensor, scale: float) -> Tensor:
    """Mean over heads and prompt rows of softmax over image columns, renormalised.

    query [w, R, kv heads, groups, d], key [w, I, kv heads, d], rows [w, R] bool, columns [w, I] bool -> [w, I].
    """
    at_once = max(1, ATTENTION_ELEMENTS // (columns.numel() * query.shape[2] * query.shape[3]))
    parts = zip(torch.split(query, at_once, dim=1), torch.split(rows, at_once, dim=1), strict=True)
    mass = torch.stack([_summed_mass(q, key, r, columns, scale) for q, r in parts]).sum(0)
    weights = (mass / rows.sum(1, keepdim=True)) * columns
    return weights / weights.sum(-1, keepdim=True).clamp(min=1e-12)


def _summed_mass(query: Tensor, key: Tensor, rows: Tensor, columns: Tensor, scale: float) -> Tensor:
    """The same of some prompt rows, summed over them and not normalised."""
    logits = torch.einsum("wrhgd,wihd->whgri", query, key).float() * scale
    logits = logits.masked_fill(~columns[:, None, None, None, :], torch.finfo(torch.float32).min)
    return (logits.softmax(-1).mean((1, 2)) * rows[:, :, None]).sum(1)


def _masked_mean(rows: Tensor, mask: Tensor) -> Tensor:
    """Mean over the second axis where the mask is set, in float32: [X, Y, D], [X, Y] -> [X, D]; 0 if none is."""
    total = torch.einsum("xyd,xy->xd", rows.float(), mask.float())
    return total / mask.sum(1, keepdim=True).clamp(min=1)
