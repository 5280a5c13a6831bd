"""Gaussian noise from a counter: the same (key, counter) gives the same number wherever and in whatever order.

Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) in int64 arithmetic, then
Box-Muller. The bits are equal on every device; the gaussians agree to the rounding of log, sqrt, sin and cos.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Four words of random bits per counter: int64 tensors with values in 0..2^32-1."""
    c0, c1, c2, c3 = counter
    k0, k1 = key[0] & _MASK, key[1] & _MASK
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def gaussian_noise(seed: int, step: int, stream: Tensor, width: int) -> Tensor:
    """Standard normal numbers [S, width] float32 for S streams.

    stream [S, 2] int64: any two numbers below 2^32 that name the stream (for target noise: the sample in the data set,
    and the slot in the sample). The numbers depend on (seed, step, stream, column) and on nothing else.
    """
    column = torch.arange((width + 3) // 4, device=stream.device)
    column = column.expand(len(stream), -1)
    first, second = ((stream[:, i : i + 1] & _MASK).expand_as(column) for i in (0, 1))
    words = philox((column, torch.zeros_like(column), first, second), key=(seed, step))
    # the centre of one of 2^24 intervals of (0, 1]: rounded in float32 above 1/2, but never 0, whose logarithm is -inf
    u = [((word >> 8).float() + 0.5) * 2.0**-24 for word in words]
    radius = [(-2 * u[i].log()).sqrt() for i in (0, 2)]
    angle = [2 * math.pi * u[i] for i in (1, 3)]
    normal = [r * f(a) for r, a in zip(radius, angle, strict=True) for f in (torch.cos, torch.sin)]
    return torch.stack(normal, dim=-1).flatten(1)[:, :width]


def _multiply(a: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 32 x 32 bit product; int64 wraps around, which leaves the bits right."""
    product = a * factor
    return (product >> 32) & _MASK, product & _MASK
