"""Stage 2 as plainly as it can be written: before each latent slot the whole prefix is computed anew.

The judge of the rollout, and what the benchmark compares it with.

Letters: B rows, T tokens, K latent slots, M segments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ilvr_ds.data.window import TokenBatch
from ilvr_ds.model.injection import last_hidden


def recompute(
    language_model: Any,
    embeddings: Tensor,
    tokens: TokenBatch,
    slots: Tensor,
    rows: Tensor,
    feed: Callable[[Tensor], Tensor] = lambda latents: latents,
    features: Tensor | None = None,
) -> Tensor:
    """Last hidden state [B, T, D], by one pass for each of the `rounds * K` latent slots and one at the end.

    slots [M, K]: flat positions of latent pads; rows [M]: the row of each segment. Segments of a row stand in order;
    a round is the next segment of every row that has one. feed: what becomes of a hidden state on its way back.
    features: for families that add them to hidden states.
    """
    T = embeddings.shape[1]
    columns = slots - T * rows[:, None]
    lengths = columns.tolist()
    for segments in _rounds(rows.tolist()):
        row, at = rows[segments].to(embeddings.device), columns[segments].to(embeddings.device)
        for k in range(slots.shape[1]):
            column = at[:, k]
            length = max(lengths[m][k] for m in segments.tolist())
            hidden = _prefix_pass(language_model, embeddings, tokens, length, features)
            embeddings = embeddings.index_put((row, column), feed(hidden[row, column - 1]))
    return last_hidden(language_model, tokens, embeddings, features=features)


def _prefix_pass(
    language_model: Any, embeddings: Tensor, tokens: TokenBatch, length: int, features: Tensor | None
) -> Tensor:
    row, column = tokens.image_slots // embeddings.shape[1], tokens.image_slots % embeddings.shape[1]
    assert features is None or bool((column < length).all()), "images stand before the first segment"
    prefix = replace(
        tokens,
        position_ids=tokens.position_ids[..., :length],
        real=tokens.real[:, :length],
        image_slots=row * length + column,
    )
    return last_hidden(language_model, prefix, embeddings[:, :length], features=features)


def _rounds(rows: list[int]) -> list[Tensor]:
    """Numbers of the segments of each round."""
    turn = [rows[:m].count(row) for m, row in enumerate(rows)]
    return [torch.tensor([m for m, t in enumerate(turn) if t == wanted]) for wanted in range(max(turn, default=-1) + 1)]
