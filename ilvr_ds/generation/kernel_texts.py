"""Kernels of decoding steps. Triton compiles their text, so they stand in a file that only needs Triton."""

# mypy: ignore-errors

import triton.language as tl


def matvec(
    inputs,
    scale,
    weight,
    other,
    added,
    output,
    N,
    eps,
    K: tl.constexpr,
    IS_NORMED: tl.constexpr,
    IS_GATED: tl.constexpr,
    IS_ADDED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """ROWS outputs: sums over K of weight [N, K] times inputs [K], and `added` [N] to them; or silu of them times the
    sums over `other` [N, K]. IS_NORMED: of inputs times `scale` [K], over the root of their mean square.

    Loads are AHEAD iterations ahead of the sums that need them.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    starts = tl.where(rows < N, rows, 0).to(tl.int64)[:, None] * K  # a row too many reads the first again
    sums = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    others = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    squares = tl.zeros([COLUMNS], dtype=tl.float32)
    for first in tl.range(0, K, COLUMNS, num_stages=AHEAD):
        columns = first + tl.arange(0, COLUMNS)
        places = starts + columns[None, :]
        if K % COLUMNS == 0:
            x = tl.load(inputs + columns).to(tl.float32)
            w = tl.load(weight + places)
            if IS_NORMED:
                s = tl.load(scale + columns)
            if IS_GATED:
                v = tl.load(other + places)
        else:
            is_column = columns < K
            x = tl.load(inputs + columns, mask=is_column, other=0.0).to(tl.float32)
            w = tl.load(weight + places, mask=is_column[None, :], other=0.0)
            if IS_NORMED:
                s = tl.load(scale + columns, mask=is_column, other=0.0)
            if IS_GATED:
                v = tl.load(other + places, mask=is_column[None, :], other=0.0)
        if IS_NORMED:
            squares += x * x
            x *= s.to(tl.float32)
        sums += w.to(tl.float32) * x[None, :]
        if IS_GATED:
            others += v.to(tl.float32) * x[None, :]
    result = tl.sum(sums, axis=1)
    if IS_NORMED:
        over = 1.0 / tl.sqrt(tl.sum(squares, axis=0) / K + eps)
        result *= over
    if IS_GATED:
        second = tl.sum(others, axis=1)
        if IS_NORMED:
            second *= over
        result = result * tl.sigmoid(result) * second
    if IS_ADDED:
        result += tl.load(added + rows, mask=rows < N, other=0.0).to(tl.float32)
    tl.store(output + rows, result.to(output.dtype.element_ty), mask=rows < N)


def rotate(
    heads,
    made,
    cos,
    sin,
    columns,
    queries,
    keys,
    values,
    heads_stride,
    made_stride,
    H,
    G,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A head of a row: queries [B, H, d] and keys are those of `heads` [B, H + G, d] rotated, values stand behind H + G
    heads in `made` [B, H + 2 G, d]. Keys and values go to column `columns` [B] of [all columns, G, d]. cos, and sin
    with the sign of its half, are [B, d]."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    places = tl.arange(0, BLOCK)
    mask = places < WIDTH
    column = tl.load(columns + row).to(tl.int64)
    if head >= H + G:
        value = tl.load(made + row * made_stride + head * WIDTH + places, mask=mask)
        tl.store(values + (column * G + head - H - G) * WIDTH + places, value, mask=mask)
    else:
        source = heads + row * heads_stride + head * WIDTH
        x = tl.load(source + places, mask=mask).to(tl.float32)
        other = tl.load(source + (places + WIDTH // 2) % WIDTH, mask=mask).to(tl.float32)
        c = tl.load(cos + row * WIDTH + places, mask=mask).to(tl.float32)
        s = tl.load(sin + row * WIDTH + places, mask=mask).to(tl.float32)
        rotated = (x * c + other * s).to(queries.dtype.element_ty)
        if head < H:
            tl.store(queries + (row * H + head) * WIDTH + places, rotated, mask=mask)
        else:
            tl.store(keys + (column * G + head - H) * WIDTH + places, rotated, mask=mask)
