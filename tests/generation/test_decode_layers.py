from __future__ import annotations

import pytest
import torch

from ilvr_ds.generation.decode_layers import attend_by_length, attend_by_mask

HEADS, GROUPS, COLUMNS, WIDTH = 4, 2, 512, 64


def _drawn(device: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values of rows of very different lengths, and these."""
    lengths = torch.tensor([1, 2, 255, 256, 257, COLUMNS], device=device)
    torch.manual_seed(0)
    queries = torch.randn(len(lengths), HEADS, WIDTH).to(device, dtype)
    keys, values = torch.randn(2, len(lengths), COLUMNS, GROUPS, WIDTH).to(device, dtype)
    return queries, keys, values, lengths


def _by_hand(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, lengths: torch.Tensor, scale: float
) -> torch.Tensor:
    """Row by row and head by head, in float64."""
    output = torch.empty(queries.shape, dtype=torch.float64)
    for row, length in enumerate(lengths.tolist()):
        for head in range(HEADS):
            group = head // (HEADS // GROUPS)
            k, v = keys[row, :length, group].double().cpu(), values[row, :length, group].double().cpu()
            output[row, head] = (k @ queries[row, head].double().cpu() * scale).softmax(0) @ v
    return output


def test_masked_columns_are_not_seen() -> None:
    """Catches heads that read another group's keys, and a column too many or too few."""
    queries, keys, values, lengths = _drawn("cpu", torch.float64)
    seen = torch.arange(COLUMNS) < lengths[:, None]
    found = attend_by_mask(seen, torch.float64)(queries, keys, values, 0.125)
    torch.testing.assert_close(found, _by_hand(queries, keys, values, lengths, 0.125))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch's flash attention needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_columns_beyond_a_row_s_length_are_not_seen(dtype: torch.dtype) -> None:
    """The same for flash attention. Outputs are rounded once, probabilities before: 2 % of the largest in bf16."""
    queries, keys, values, lengths = _drawn("cuda", dtype)
    found = attend_by_length(lengths, COLUMNS)(queries, keys, values, 0.125).double().cpu()
    torch.testing.assert_close(found, _by_hand(queries, keys, values, lengths, 0.125), rtol=0.02, atol=0.02)
