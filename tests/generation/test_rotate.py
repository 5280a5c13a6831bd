"""Rotated queries and keys, written where they belong: the kernel beside float32."""

from __future__ import annotations

import torch

from ilvr_ds.generation.rotate import Rotation, launch, rotate_and_keep
from tests.generation.kernel_device import KERNEL_DEVICE, ROUNDED, needs_kernels

B, H, G, U = 3, 6, 2, 5


@needs_kernels
def test_the_kernel_rotates_and_keeps_as_pytorch_does() -> None:
    """Heads of 80 numbers, no power of two. Catches a half with the wrong sign, and heads of another row's column.
    Rounded to bf16 once."""
    torch.manual_seed(0)
    for width in (80, 128):
        made = torch.randn(B, H + 2 * G, width).bfloat16().to(KERNEL_DEVICE)
        angles = torch.rand(B, 1, width // 2) * 6
        cos, sin = (torch.cat([f(angles)] * 2, dim=-1).bfloat16().to(KERNEL_DEVICE) for f in (torch.cos, torch.sin))
        columns = torch.tensor([4, 5, 13], device=KERNEL_DEVICE)
        kept = torch.zeros(2, B * U, G, width, device=KERNEL_DEVICE).bfloat16()
        exact = kept.float()
        expected = rotate_and_keep(
            Rotation(cos.float(), sin.float()), made[:, : H + G].float(), made.float(), columns, *exact
        )
        queries = torch.empty(B, H, width, device=KERNEL_DEVICE).bfloat16()
        launch(Rotation(cos, sin), made[:, : H + G], made, columns, queries, *kept)
        torch.testing.assert_close(queries.float(), expected, rtol=ROUNDED, atol=1e-3)
        torch.testing.assert_close(kept.float(), exact, rtol=ROUNDED, atol=1e-3)


def test_halves_are_turned_against_each_other() -> None:
    """By a quarter: (a, b) becomes (-b, a)."""
    zero, one = torch.zeros(1, 1, 4), torch.ones(1, 1, 4)
    heads = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])
    assert Rotation(zero, one)(heads).tolist() == [[[-3.0, -4.0, 1.0, 2.0]]]
