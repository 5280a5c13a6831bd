"""The kernel of matvec.py. Triton compiles its text, so it stands in a file that only needs Triton."""

# mypy: ignore-errors

import triton.language as tl


def matvec(
    inputs,
    weight,
    other,
    added,
    output,
    N,
    K: tl.constexpr,
    IS_GATED: tl.constexpr,
    IS_ADDED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """ROWS outputs: sums over K of weight [N, K] times inputs [K], and `added` [N] to them; or silu of them times the
    sums over `other` [N, K]."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    starts = rows.to(tl.int64)[:, None] * K
    is_row = rows < N
    sums = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    others = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for first in range(0, K, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        is_column = columns < K
        mask = is_row[:, None] & is_column[None, :]
        x = tl.load(inputs + columns, mask=is_column, other=0.0).to(tl.float32)[None, :]
        places = starts + columns[None, :]
        sums += tl.load(weight + places, mask=mask, other=0.0).to(tl.float32) * x
        if IS_GATED:
            others += tl.load(other + places, mask=mask, other=0.0).to(tl.float32) * x
    result = tl.sum(sums, axis=1)
    if IS_GATED:
        result = result * tl.sigmoid(result) * tl.sum(others, axis=1)
    if IS_ADDED:
        result += tl.load(added + rows, mask=is_row, other=0.0).to(tl.float32)
    tl.store(output + rows, result.to(output.dtype.element_ty), mask=is_row)
