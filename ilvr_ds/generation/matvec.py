"""Products of matrices with one vector at the speed of memory: a decoding step of a single row.

A row alone reads all weights for one vector, so nothing counts but how evenly they come, and that nothing else is
launched between. One Triton kernel does the product and what stands around it: the norm of what goes in, a bias or a
residual, or the gate. The formulas are PyTorch's, which also compute wherever it does not: with more rows, and
where kernels.py says so.

`norm` is a root-mean-square norm of transformers. Letters: N outputs, K inputs.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

from torch import Tensor
from torch.nn.functional import linear, silu

from ilvr_ds.generation.kernels import can_run, kernel


class Tile(NamedTuple):
    """Of a matrix: what a block of threads takes at a time, and how many of these it has under way."""

    rows: int
    columns: int
    warps: int
    ahead: int


PLAIN, GATED, LONG = Tile(4, 512, 1, 3), Tile(4, 4096, 8, 3), Tile(1, 512, 1, 1)
"""For one matrix, for two at once, and for one with more than LONG_FROM inputs: the fastest of 60 on an H200 at the
shapes of 7B (tests/bench/matvec.py)"""
LONG_FROM = 8192


def product(inputs: Tensor, weight: Tensor, bias: Tensor | None, norm: Any = None) -> Tensor:
    """[B, K] -> [B, N], as `linear` of normed inputs."""
    if not _is_one(inputs):
        return linear(_normed(inputs, norm), weight, bias)
    output = inputs.new_empty(1, len(weight))
    launch(inputs, weight, None, bias, output, norm)
    return output


def add_product(residual: Tensor, inputs: Tensor, weight: Tensor) -> Tensor:
    """residual [B, N] plus the product of inputs [B, K], in place."""
    if not _is_one(inputs):
        return residual.addmm_(inputs, weight.t())
    launch(inputs, weight, None, residual, residual)
    return residual


def gated(inputs: Tensor, gate: Tensor, up: Tensor, norm: Any) -> Tensor:
    """[B, K] -> [B, N]: silu of the one product of normed inputs times the other."""
    if not _is_one(inputs):
        normed = _normed(inputs, norm)
        return silu(linear(normed, gate)).mul_(linear(normed, up))
    output = inputs.new_empty(1, len(gate))
    launch(inputs, gate, up, None, output, norm)
    return output


def _normed(inputs: Tensor, norm: Any) -> Tensor:
    return inputs if norm is None else cast(Tensor, norm(inputs))


def _is_one(inputs: Tensor) -> bool:
    return len(inputs) == 1 and can_run(inputs)


def launch(
    inputs: Tensor, weight: Tensor, other: Tensor | None, added: Tensor | None, output: Tensor,
    norm: Any = None, tile: Tile | None = None,
) -> None:  # fmt: skip
    """The kernel; `tile`: another one than is best for such a shape."""
    N, K = weight.shape
    assert weight.is_contiguous() and inputs.is_contiguous() and (other is None or other.is_contiguous())
    tile = tile or (GATED if other is not None else LONG if K > LONG_FROM else PLAIN)
    kernel("matvec")[(-(-N // tile.rows),)](
        inputs, inputs if norm is None else norm.weight, weight, weight if other is None else other,
        output if added is None else added, output, N, 0.0 if norm is None else norm.variance_epsilon,
        K=K, IS_NORMED=norm is not None, IS_GATED=other is not None, IS_ADDED=added is not None,
        ROWS=tile.rows, COLUMNS=tile.columns, AHEAD=tile.ahead, num_warps=tile.warps,
    )  # fmt: skip
