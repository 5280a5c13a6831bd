"""bitsandbytes' AdamW in 8 bits, for as many weights in one tensor as there are.

Its kernels count the elements of a tensor in 32 bits (bitsandbytes 0.50.2, `ct.c_int32(g.numel())`). Under ZeRO-1 and 2
all of a rank's weights are one tensor: from 2^31 of them on the kernel fails, and of 2^32 + n it would update the first
n and say nothing. Here such tensors are updated in pieces, to the same bits: states belong to blocks of 256 elements.
"""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit
from torch import Tensor

BLOCK = 256
"""Elements that share a scale of their state"""
PIECE = 2**30
"""Elements of a piece: whole blocks"""


class _InPieces:
    """Beside one of bitsandbytes' optimizers."""

    state: Any

    @torch.no_grad()
    def update_step(self, group: dict[str, Any], p: Tensor, gindex: int, pindex: int) -> None:
        """Update `p` by its gradient."""
        update = super().update_step  # type: ignore[misc]
        if p.numel() <= PIECE:
            update(group, p, gindex, pindex)
            return
        assert p.grad is not None
        state, grad, flat = self.state[p], p.grad.contiguous().view(-1), p.data.view(-1)
        for start in range(0, p.numel(), PIECE):
            elements, blocks = slice(start, start + PIECE), slice(start // BLOCK, (start + PIECE) // BLOCK)
            piece = flat[elements]
            piece.grad = grad[elements]
            self.state[piece] = {
                **state,
                **{name: _part(state[name], elements) for name in ("state1", "state2")},
                **{name: state[name][blocks] for name in ("absmax1", "absmax2")},
            }
            update(group, piece, gindex, pindex)
            del self.state[piece]
        state["step"] += 1


def _part(state: Any, elements: slice) -> Any:
    """Some elements of a state. A paged one is to torch a tensor on the CPU, with a mark by which it may be used."""
    part = state.view(-1)[elements]
    part.is_paged = getattr(state, "is_paged", False)
    return part


class AdamW8bitInPieces(_InPieces, AdamW8bit):  # type: ignore[misc]
    """States on the device."""


class PagedAdamW8bitInPieces(_InPieces, PagedAdamW8bit):  # type: ignore[misc]
    """States in memory that the driver moves to the host when the device's is full."""
