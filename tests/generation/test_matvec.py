"""What one row is computed with on a GPU, beside PyTorch's own; on a CPU they are the same functions."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear, silu

from ilvr_ds.generation.decode_layers import attend_by_length, attend_by_mask
from ilvr_ds.generation.matvec import add_product, gated, product

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(1, 40, 1000), (1, 37, 512), (1, 4608, 3584), (3, 40, 64)])
def test_products_are_those_of_float32_rounded(device: str, rows: int, outputs: int, inputs: int) -> None:
    draw = torch.Generator().manual_seed(0)

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw).bfloat16().to(device)

    x, weight, other = values(rows, inputs) / inputs**0.5, values(outputs, inputs), values(outputs, inputs)
    bias, residual = values(outputs), values(rows, outputs)
    one, two = linear(x.float(), weight.float()), linear(x.float(), other.float())
    torch.testing.assert_close(product(x, weight, None).float(), one, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(product(x, weight, bias).float(), one + bias, rtol=1e-2, atol=2e-2)
    torch.testing.assert_close(gated(x, weight, other).float(), silu(one) * two, rtol=3e-2, atol=3e-2)
    expected = residual.float() + one
    assert add_product(residual, x, weight) is residual
    torch.testing.assert_close(residual.float(), expected, rtol=1e-2, atol=2e-2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("rows", [1, 5])
def test_attention_by_length_is_attention_by_mask(rows: int) -> None:
    """Catches columns that are read beyond a row's length, and rows that read each other's."""
    device = torch.device("cuda")
    torch.manual_seed(0)
    columns, heads, groups, width = 768, 28, 4, 128
    queries = torch.randn(rows, heads, width, device=device, dtype=torch.bfloat16)
    keys, values = (torch.randn(rows, columns, groups, width, device=device).bfloat16() for _ in range(2))
    lengths = torch.tensor([700, 1, 64, 513, 768][:rows], device=device)
    seen = torch.arange(columns, device=device) < lengths[:, None]
    by_length = attend_by_length(lengths, columns)(queries, keys, values, width**-0.5)
    by_mask = attend_by_mask(seen, torch.float32)(queries.float(), keys.float(), values.float(), width**-0.5)
    torch.testing.assert_close(by_length.float(), by_mask, rtol=2e-2, atol=2e-2)
