"""The momentum update of weights whose float32 average is kept as two halves of 16 bits.

The upper half is the average rounded to bf16, which is what the teacher computes with; the lower half is what the
average's bits, as an integer, are above or below the upper half's. Exact ties are rounded away from zero, so that the
difference always fits. Together they are the average to the last bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ilvr_ds.ops.build import use_native


def split(average: Tensor) -> tuple[Tensor, Tensor]:
    """[n] float32 -> upper half [n] bf16 and lower half [n] int16, on the same device."""
    # one NaN for all: rounding up the largest would wrap to a zero
    bits = torch.where(average.isnan(), torch.nan, average).view(torch.int32)
    upper = (bits + 2**15) >> 16
    return upper.short().view(torch.bfloat16), (bits - (upper << 16)).short()


def join(upper: Tensor, lower: Tensor) -> Tensor:
    """The average that `split` took apart."""
    return ((upper.view(torch.int16).int() << 16) + lower).view(torch.float32)


def ema_update(upper: Tensor, lower: Tensor, student: Tensor, weight: float, sums: Tensor) -> None:
    """average += weight * (student - average), and (average - student)^2 and student^2 onto `sums`, all in place.

    upper [n] bf16, lower [n] int16, student [n] float32, sums [2] float64, contiguous and on one device. On a GPU the
    order in which `sums` are added up is open.
    """
    if use_native(upper.device.type):
        torch.ops.ilvr_ds.ema_update(upper, lower, student, weight, sums)
        return
    average = join(upper, lower).lerp_(student, weight)
    sums += squares(average - student, student)
    for half, new in zip((upper, lower), split(average), strict=True):
        half.copy_(new)


def squares(*tensors: Tensor) -> Tensor:
    """The sum of the squares of each, to 1e-5 also of millions: `vector_norm` on a CPU is off by a hundredth."""
    return torch.stack([tensor.square().sum() for tensor in tensors])
