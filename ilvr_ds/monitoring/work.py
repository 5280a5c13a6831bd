"""The work in a window, counted on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from ilvr_ds.data.window import Window
from ilvr_ds.planning.flops import Work


def work_of(window: Window) -> Work:
    """The work of a window that is still on the CPU, padding not counted."""
    lengths = torch.tensor(window.tokens.lengths)
    images = [_lengths(batch.cu_seqlens) for batch in window.images]
    windows = [_lengths(batch.cu_window_seqlens) for batch in window.images if batch.cu_window_seqlens is not None]
    return Work(
        samples=len(lengths),
        tokens=window.num_tokens,
        squares=_squares(lengths),
        labels=int(window.supervised),
        patches=sum(int(lengths.sum()) for lengths in images),
        image_squares=sum(map(_squares, images)),
        window_squares=sum(map(_squares, windows)),
    )


def _lengths(bounds: Tensor) -> Tensor:
    return bounds.diff()


def _squares(lengths: Tensor) -> int:
    return int(lengths.long().square().sum())
