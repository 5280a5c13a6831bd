"""Fingerprints that tell weights apart: computed where the weights lie, the same on every device."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

PIECE = 2**24
"""Elements that are summed at a time."""
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(weights: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of the names, shapes, dtypes and bits of weights, in any order."""
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
