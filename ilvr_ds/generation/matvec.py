"""Products of matrices with one vector at the speed of memory: a decoding step of a single row.

A row alone reads all weights for one vector, so nothing counts but how evenly they come, and that nothing else is
launched between. One Triton kernel does the product and what stands around it: a bias or a residual, or the gate. The
formulas are PyTorch's, which also compute wherever it does not: with more rows, on a CPU, in float32, without Triton.

Letters: N outputs, K inputs.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

_ROWS, _COLUMNS, _WARPS = 8, 512, 4
"""Of a matrix, for a block of threads at a time"""


def product(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[B, K] -> [B, N], as `linear`."""
    if not _is_one(inputs):
        return linear(inputs, weight, bias)
    output = inputs.new_empty(1, len(weight))
    _launch(inputs, weight, None, bias, output)
    return output


def add_product(residual: Tensor, inputs: Tensor, weight: Tensor) -> Tensor:
    """residual [B, N] plus the product of inputs [B, K], in place."""
    if not _is_one(inputs):
        return residual.addmm_(inputs, weight.t())
    _launch(inputs, weight, None, residual, residual)
    return residual


def gated(inputs: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """[B, K] -> [B, N]: silu of the one product times the other."""
    if not _is_one(inputs):
        return silu(linear(inputs, gate)).mul_(linear(inputs, up))
    output = inputs.new_empty(1, len(gate))
    _launch(inputs, gate, up, None, output)
    return output


def _is_one(inputs: Tensor) -> bool:
    return len(inputs) == 1 and inputs.is_cuda and inputs.dtype in (torch.float16, torch.bfloat16) and _has_triton()


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _launch(inputs: Tensor, weight: Tensor, other: Tensor | None, added: Tensor | None, output: Tensor) -> None:
    N, K = weight.shape
    assert weight.is_contiguous() and inputs.is_contiguous() and (other is None or other.is_contiguous())
    _kernel()[(-(-N // _ROWS),)](
        inputs, weight, weight if other is None else other, output if added is None else added, output, N,
        K=K, IS_GATED=other is not None, IS_ADDED=added is not None, ROWS=_ROWS, COLUMNS=_COLUMNS, num_warps=_WARPS,
    )  # fmt: skip


@cache
def _kernel() -> Any:
    import triton

    from ilvr_ds.generation import matvec_kernel

    return triton.jit(matvec_kernel.matvec)
