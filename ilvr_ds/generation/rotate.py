"""Rotated queries and keys of a decoding step, with keys and values written where they belong: one kernel for six.

Letters: B rows, H heads of queries, G of keys and values, d numbers of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ilvr_ds.generation.kernels import can_run, kernel


class Rotation:
    """Cosines and sines [B, 1, d] of each row's position, for `x cos + rotate_half(x) sin`."""

    def __init__(self, cos: Tensor, sin: Tensor) -> None:
        half = sin.shape[-1] // 2
        self.cos = cos.contiguous()
        self.sin = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)  # rotate_half is a roll with this sign

    def __call__(self, heads: Tensor) -> Tensor:
        """[B, heads, d], rotated; not in place."""
        return torch.addcmul(heads * self.cos, heads.roll(heads.shape[-1] // 2, dims=-1), self.sin)


def rotate_and_keep(
    rotation: Rotation, heads: Tensor, made: Tensor, columns: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """heads [B, H + G, d] of queries and keys, made [B, H + 2 G, d] with values behind -> rotated queries [B, H, d].

    Rotated keys, and values, go to `columns` [B] of keys and values [columns of all rows, G, d].
    """
    G = keys.shape[1]
    H = heads.shape[1] - G
    if not can_run(made):
        rotated = rotation(heads)
        keys.index_copy_(0, columns, rotated[:, H:])
        values.index_copy_(0, columns, made[:, H + G :])
        return rotated[:, :H]
    queries = made.new_empty(len(made), H, made.shape[2])
    launch(rotation, heads, made, columns, queries, keys, values)
    return queries


def launch(
    rotation: Rotation, heads: Tensor, made: Tensor, columns: Tensor, queries: Tensor, keys: Tensor, values: Tensor
) -> None:
    """The kernel."""
    B, H, d = queries.shape
    G = keys.shape[1]
    assert heads.stride()[1:] == made.stride()[1:] == (d, 1) and keys.is_contiguous() and values.is_contiguous()
    kernel("rotate")[(B, H + 2 * G)](
        heads, made, rotation.cos, rotation.sin, columns, queries, keys, values, heads.stride(0), made.stride(0), H, G,
        WIDTH=d, BLOCK=1 << (d - 1).bit_length(), num_warps=1,
    )  # fmt: skip
