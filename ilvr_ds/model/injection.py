"""Running a language model on sequences with image features and latents written into them."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from ilvr_ds.data.window import TokenBatch
from ilvr_ds.model.families import family_of
from ilvr_ds.model.layers.attention import sequence_bounds


def write_images(embeddings: Tensor, tokens: TokenBatch, features: Tensor) -> Tensor:
    """Token embeddings [R, T, D] with merged image features at the image positions; not in place.

    features [F, D or more]: what stands behind the merged features is `last_hidden`'s.
    """
    flat = embeddings.flatten(0, 1)
    rows = features[:, : flat.shape[1]][tokens.image_rows].to(flat.dtype)
    return flat.index_copy(0, tokens.image_slots, rows).view_as(embeddings)


def write_latents(embeddings: Tensor, slots: Tensor, values: Tensor, is_set: Tensor) -> Tensor:
    """`values` [M, K, D] at the flat positions `slots` [M, K] where `is_set` [M, K], the pad embedding elsewhere."""
    flat = embeddings.flatten(0, 1)
    slots = slots.flatten()
    rows = torch.where(is_set.flatten()[:, None], values.flatten(0, 1).to(flat.dtype), flat[slots])
    return flat.index_copy(0, slots, rows).view_as(embeddings)


def added_rows(language_model: Any, tokens: TokenBatch, features: Tensor | None) -> tuple[Tensor, ...]:
    """What a language model adds to its hidden states at the image positions: [image tokens, D] behind each of its
    first layers.

    features [F, D or more]: each row holds it behind the merged feature. Raises RuntimeError where the family needs
    features that are not given: it would compute something else without a word.
    """
    if features is None:
        if tokens.image_slots.numel() and family_of(language_model.config).adds_features:
            raise RuntimeError("images, but no features: this family adds them to hidden states too")
        return ()
    width = language_model.config.hidden_size
    if features.shape[1] == width:
        return ()
    return torch.split(features[:, width:][tokens.image_rows], width, dim=1)


def last_hidden(
    language_model: Any, tokens: TokenBatch, embeddings: Tensor, cache: Any = None, features: Tensor | None = None
) -> Tensor:
    """Last hidden state after the final norm [R, T, D]; keys and values go into `cache` where there is one.

    features [F, D or more]: those that `write_images` wrote; not needed where the family adds nothing.

    The mask is passed ready-made: transformers would otherwise read device values to see whether it needs one.
    With padding on the right a causal model needs none, and packed rows have bounds instead.
    """
    if tokens.right_padded:
        mask = None
    elif "flash" in language_model.config._attn_implementation:
        mask = tokens.real
    else:
        T = embeddings.shape[1]
        causal = torch.ones(T, T, dtype=torch.bool, device=embeddings.device).tril()
        itself = torch.eye(T, dtype=torch.bool, device=embeddings.device)
        mask = (causal & tokens.real[:, None, None, :]) | itself  # a row of padding must not be empty: NaN
    family = family_of(language_model.config)
    output = language_model(
        inputs_embeds=embeddings,
        position_ids=tokens.position_ids,
        attention_mask=family.mask_argument(mask),
        past_key_values=cache,
        use_cache=cache is not None,
        **sequence_bounds(language_model, tokens),
        **family.added_arguments(language_model, tokens.image_slots, added_rows(language_model, tokens, features)),
    )
    return cast(Tensor, output.last_hidden_state)
