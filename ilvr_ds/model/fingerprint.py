"""A name for weights, which tells them apart: computed where they lie, the same on every device and in any pieces."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

PIECE = 2**24
"""Elements that are taken together."""
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(weights: Iterable[tuple[str, Tensor]]) -> str:
    """Of named weights in any order: their names, shapes, precisions and bits."""
    lines = sorted(f"{name} {tuple(weight.shape)} {weight.dtype} {_checksum(weight)}" for name, weight in weights)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@torch.no_grad()
def _checksum(weight: Tensor) -> int:
    """The sum of all elements' bits, each times an odd number of its own, modulo 2^64: exact in any order."""
    bits = weight.contiguous().flatten().view(_INTEGERS[weight.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=weight.device)
    for start in range(0, len(bits), PIECE):
        piece = bits[start : start + PIECE].long()
        total += (piece * torch.arange(2 * start + 1, 2 * (start + len(piece)), 2, device=piece.device)).sum()
    return int(total)
