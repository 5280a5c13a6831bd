"""The next token of each row: the likeliest one, or one drawn from the nucleus."""

from __future__ import annotations

import zlib

import numpy as np
import torch
from torch import Tensor

LEAST = 1e-30
"""Temperatures, and masses of a nucleus, that are above 0 but below this count as this: float32 has no use for them."""


def choose_tokens(logits: Tensor, temperature: float | Tensor, top_p: float | Tensor, uniform: Tensor | None) -> Tensor:
    """Tokens [B] for logits [B, V]: greedy without `uniform` [B], else by inverting the distribution there.

    top_p: tokens are drawn from the smallest set of likeliest ones whose probability reaches it. Both numbers are
    LEAST or more, and may stand on the device.
    """
    if uniform is None:
        return logits.argmax(-1)
    probabilities, tokens = (logits.float() / temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    before = probabilities.cumsum(-1) - probabilities
    probabilities = probabilities * (before < top_p)
    total = probabilities.cumsum(-1)
    rank = (total <= uniform[:, None] * total[:, -1:]).sum(-1)
    rank = rank.minimum((probabilities > 0).sum(-1) - 1)  # a product that rounds up to the whole mass
    return tokens.gather(-1, rank[:, None])[:, 0]


def uniform_numbers(ids: list[str], seed: int, count: int) -> Tensor:
    """Numbers [count, B] in [0, 1) that depend on the seed and on each row's id, not on the other rows."""
    rows = [np.random.default_rng([seed, zlib.crc32(name.encode())]).random(count, dtype=np.float32) for name in ids]
    return torch.from_numpy(np.stack(rows, axis=1))
