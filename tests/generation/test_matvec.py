"""One row's products, beside float32. Kernels run on a GPU, or in Triton's interpreter:

TRITON_INTERPRET=1 python -m pytest tests/generation/test_matvec.py tests/generation/test_rotate.py
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import linear, rms_norm, silu

from ilvr_ds.generation.kernels import can_run, use_kernels
from ilvr_ds.generation.matvec import Tile, add_product, gated, launch, product
from tests.generation.kernel_device import KERNEL_DEVICE, ROUNDED, needs_kernels

TILES = [None, Tile(1, 1024, 4, 3), Tile(8, 512, 4, 1)]


def _drawn(N: int, K: int, device: str, rows: int = 1) -> tuple[torch.Tensor, ...]:
    draw = torch.Generator().manual_seed(0)

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw).bfloat16().to(device)

    return 3 * values(rows, K), values(N, K) / K**0.5, values(N, K) / K**0.5, values(N), values(rows, N)


def _norm(K: int, device: str) -> nn.RMSNorm:
    norm: Any = nn.RMSNorm(K, 1e-6)
    norm.variance_epsilon = 1e-6  # its name in transformers
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
    return norm.requires_grad_(False).to(device, torch.bfloat16)


def _is_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Rounded to bf16 once. Sums in float32 of another order are off by less."""
    torch.testing.assert_close(found.float(), expected, rtol=ROUNDED, atol=1e-4)


@needs_kernels
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(("N", "K"), [(40, 1000), (37, 512), (128, 3584)])
def test_the_kernel_s_products_are_those_of_float32_rounded(N: int, K: int, tile: Tile | None) -> None:
    """Catches sums over columns beyond the end, a row too many, and a norm that is taken of the wrong numbers."""
    x, weight, other, bias, residual = _drawn(N, K, KERNEL_DEVICE)
    norm = _norm(K, KERNEL_DEVICE)
    normed = rms_norm(x.float(), (K,), norm.weight.float(), 1e-6)
    output = torch.empty_like(residual)
    launch(x, weight, None, None, output, tile=tile)
    _is_close(output, linear(x.float(), weight.float()))
    launch(x, weight, None, bias, output, norm, tile=tile)
    _is_close(output, linear(normed, weight.float(), bias.float()))
    launch(x, weight, other, None, output, norm, tile=tile)
    _is_close(output, silu(linear(normed, weight.float())) * linear(normed, other.float()))
    expected = residual.float() + linear(x.float(), weight.float())
    launch(x, weight, None, residual, residual, tile=tile)
    _is_close(residual, expected)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_kernels)])
@pytest.mark.parametrize("rows", [1, 3])
def test_products_are_pytorch_s(device: str, rows: int) -> None:
    """What is chosen by number of rows: rounded more than once, by at most 2 % of the largest."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    x, weight, other, bias, residual = _drawn(64, 512, device, rows)
    norm = _norm(512, device)
    normed = rms_norm(x.float(), (512,), norm.weight.float(), 1e-6)
    one, two = linear(normed, weight.float()), linear(normed, other.float())
    torch.testing.assert_close(product(x, weight, bias, norm).float(), one + bias, rtol=0.02, atol=0.04)
    torch.testing.assert_close(gated(x, weight, other, norm).float(), silu(one) * two, rtol=0.03, atol=0.06)
    expected = residual.float() + linear(x.float(), weight.float())
    assert add_product(residual, x, weight) is residual
    torch.testing.assert_close(residual.float(), expected, rtol=0.02, atol=0.04)


def test_kernels_are_for_16_bit_on_a_gpu() -> None:
    assert not can_run(torch.zeros(1, 4))
    assert not can_run(torch.zeros(1, 4).bfloat16())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kernels_can_be_switched_off() -> None:
    x = torch.zeros(1, 4, device="cuda").bfloat16()
    assert can_run(x)
    use_kernels(False)
    try:
        assert not can_run(x)
    finally:
        use_kernels(True)
