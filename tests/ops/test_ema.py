"""The average in two halves: nothing is lost, whatever the number, and both ways to compute it agree."""

from __future__ import annotations

import pytest
import torch

from ilvr_ds.ops.ema import ema_update, join, split
from tests.ops.native import DEVICES


def numbers(device: str) -> torch.Tensor:
    """All exponents and signs with random bits below, exact ties, zeros, the smallest and the largest."""
    draw = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31 - 1, (2**16,), generator=draw, dtype=torch.int64).int()
    ties = (torch.arange(-(2**15), 2**15) << 16).int() + 2**15
    values = torch.cat([bits, ties]).view(torch.float32)
    values = values[values.abs() < 3e38]  # beyond, bf16 rounds to infinity
    return torch.cat([values, torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1.0])]).to(device)


@pytest.mark.parametrize("device", DEVICES)
def test_the_halves_are_the_number_and_the_upper_one_is_its_nearest_in_bf16(device: str) -> None:
    values = numbers(device)
    upper, lower = split(values)
    assert torch.equal(join(upper, lower).view(torch.int32), values.view(torch.int32))
    nearest = values.bfloat16()
    is_tie = (values.view(torch.int32) & 0xFFFF) == 2**15
    assert torch.equal(upper[~is_tie], nearest[~is_tie]), "ties apart it is torch's own rounding"
    assert bool(((upper.float() - values).abs() <= (nearest.float() - values).abs()).all())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("count", [1, 255, 100_003])
def test_it_is_the_average_of_float64(device: str, count: int) -> None:
    draw = torch.Generator().manual_seed(1)
    average, student = (torch.randn(count, generator=draw) for _ in range(2))
    upper, lower = (half.to(device) for half in split(average))
    sums = torch.ones(2, dtype=torch.float64, device=device)
    ema_update(upper, lower, student.to(device), 0.01, sums)
    wanted = average.double() + 0.01 * (student.double() - average.double())
    torch.testing.assert_close(join(upper, lower).double().cpu(), wanted, rtol=3e-7, atol=1e-7)
    exact = torch.stack([1 + (wanted - student.double()).square().sum(), 1 + student.double().square().sum()])
    torch.testing.assert_close(sums.cpu(), exact, rtol=1e-5, atol=0)  # squares are added up in float32


@pytest.mark.parametrize("device", DEVICES)
def test_sums_of_a_large_piece_lose_nothing(device: str) -> None:
    """Catches sums in float32 one after the other, as of a norm on a CPU."""
    upper, lower = split(torch.zeros(2**24, device=device))
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    ema_update(upper, lower, torch.full((2**24,), 0.02, device=device), 0.5, sums)
    assert sums.tolist() == pytest.approx([2**24 * 1e-4, 2**24 * 4e-4], rel=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_no_number_stays_none(device: str) -> None:
    """A NaN with all bits set, which is what a GPU makes, would be rounded up to a zero."""
    bits = torch.tensor([0x7FFFFFFF, -1, 0x7FC00000, 0x7F800001], dtype=torch.int32, device=device)
    upper, lower = split(bits.view(torch.float32))
    assert bool(upper.isnan().all()) and bool(join(upper, lower).isnan().all())
    upper, lower = split(torch.ones(4, device=device))
    student = torch.tensor([1.0, torch.nan, torch.inf, 1.0], device=device)
    ema_update(upper, lower, student, 0.25, torch.zeros(2, dtype=torch.float64, device=device))
    assert upper.isnan().tolist() == [False, True, False, False]
    assert join(upper, lower).tolist()[2:] == [torch.inf, 1.0]
