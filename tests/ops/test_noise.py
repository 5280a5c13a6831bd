"""Counter-based noise against published bits, against a plain Box-Muller, and as a sample of a normal distribution."""

from __future__ import annotations

import math

import pytest
import torch

from ilvr_ds.ops import noise
from ilvr_ds.ops.noise import gaussian_noise, philox

ONES = 0xFFFFFFFF
KNOWN = {  # Random123, kat_vectors, philox4x32 with 10 rounds: counter, key, output
    "zero": ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    "ones": ((ONES,) * 4, (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    "pi": (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
}


def streams(count: int) -> torch.Tensor:
    """Slot numbers of samples as the trainer counts them, [count, 2]."""
    number = torch.arange(count)
    return torch.stack([number // 8, number % 8], dim=1)


@pytest.mark.parametrize("name", KNOWN)
def test_philox_gives_the_published_bits(name: str) -> None:
    counter, key, wanted = KNOWN[name]
    words = philox(tuple(torch.tensor([word]) for word in counter), key)
    assert [int(word) for word in words] == list(wanted)


def test_a_batch_of_counters_gives_what_each_gives_alone() -> None:
    vectors = [KNOWN["zero"][0], KNOWN["pi"][0], KNOWN["ones"][0]]
    together = philox(tuple(torch.tensor(vectors).T), key=(5, 6))
    for row, counter in enumerate(vectors):
        alone = philox(tuple(torch.tensor([word]) for word in counter), key=(5, 6))
        assert [int(word[row]) for word in together] == [int(word) for word in alone]


def test_numbers_are_box_muller_of_the_counters_words() -> None:
    """Four columns to a counter (column, 0, sample, slot): pins the layout that another implementation must copy."""
    seed, step, width = 11, 3, 10
    stream = torch.tensor([[0, 0], [7, 5], [2**31, 1], [ONES, 63]])
    actual = gaussian_noise(seed, step, stream, width)
    for row, (sample, slot) in enumerate(stream.tolist()):
        wanted: list[float] = []
        for column in range(math.ceil(width / 4)):
            counter = tuple(torch.tensor([word]) for word in (column, 0, sample, slot))
            u = [((int(word) >> 8) + 0.5) / 2**24 for word in philox(counter, (seed, step))]
            for radius, angle in ((u[0], u[1]), (u[2], u[3])):
                length = math.sqrt(-2 * math.log(radius))
                wanted += [length * math.cos(2 * math.pi * angle), length * math.sin(2 * math.pi * angle)]
        # float32: u is off by 2^-25, which the angle takes times 2 pi and the radius (at most 6)
        torch.testing.assert_close(
            actual[row].double(), torch.tensor(wanted[:width]).double(), atol=2e-5, rtol=0, check_dtype=False
        )


def test_the_order_and_the_company_of_streams_do_not_matter() -> None:
    stream = streams(40)
    whole = gaussian_noise(1, 2, stream, 12)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(gaussian_noise(1, 2, stream[order], 12), whole[order])
    assert torch.equal(gaussian_noise(1, 2, stream[17:18], 12), whole[17:18])


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 63])
def test_a_narrower_call_gives_the_first_columns(width: int) -> None:
    wide = gaussian_noise(1, 2, streams(5), 64)
    narrow = gaussian_noise(1, 2, streams(5), width)
    assert narrow.shape == (5, width) and torch.equal(narrow, wide[:, :width])


@pytest.mark.parametrize(
    ("seed", "step", "sample", "slot"),
    [(2, 2, 3, 4), (1, 3, 3, 4), (1, 2, 4, 4), (1, 2, 3, 5), (2, 1, 3, 4), (1, 2, 4, 3)],
    ids=["seed", "step", "sample", "slot", "seed and step swapped", "sample and slot swapped"],
)
def test_every_part_of_the_key_changes_the_numbers(seed: int, step: int, sample: int, slot: int) -> None:
    base = gaussian_noise(1, 2, torch.tensor([[3, 4]]), 256)
    other = gaussian_noise(seed, step, torch.tensor([[sample, slot]]), 256)
    # 24-bit uniforms: equal numbers by chance are rarer than one column in a thousand of such tests
    assert (base == other).sum() <= 1


def test_no_row_comes_twice_over_steps_samples_and_slots() -> None:
    rows = torch.cat([gaussian_noise(0, step, streams(512), 4) for step in range(8)])
    assert len(torch.unique(rows, dim=0)) == len(rows)


class TestMoments:
    """Over n = 2^20 numbers; each bound is five standard errors of the estimate for a true standard normal."""

    values = gaussian_noise(0, 1, streams(4096), 256).double()
    n = values.numel()

    def test_mean(self) -> None:
        assert abs(self.values.mean()) < 5 / math.sqrt(self.n)

    def test_variance(self) -> None:
        assert abs(self.values.pow(2).mean() - 1) < 5 * math.sqrt(2 / self.n)

    def test_skewness(self) -> None:
        assert abs(self.values.pow(3).mean()) < 5 * math.sqrt(15 / self.n)

    def test_kurtosis(self) -> None:
        assert abs(self.values.pow(4).mean() - 3) < 5 * math.sqrt(96 / self.n)

    @pytest.mark.parametrize("lag", [1, 2, 3, 4])
    def test_neighbouring_columns_are_uncorrelated(self, lag: int) -> None:
        a, b = self.values[:, lag:], self.values[:, :-lag]
        assert abs((a * b).mean()) < 5 / math.sqrt(a.numel())

    @pytest.mark.parametrize("lag", [1, 2, 3, 4])
    def test_magnitudes_of_neighbouring_columns_are_uncorrelated(self, lag: int) -> None:
        """Sine and cosine share a radius: reused where it should be fresh, it shows in the squares."""
        a, b = self.values[:, lag:].pow(2) - 1, self.values[:, :-lag].pow(2) - 1
        assert abs((a * b).mean()) < 5 * 2 / math.sqrt(a.numel())

    def test_neighbouring_streams_and_steps_are_uncorrelated(self) -> None:
        following = gaussian_noise(0, 2, streams(4096), 256).double()
        assert abs((self.values * following).mean()) < 5 / math.sqrt(self.n)
        assert abs((self.values[1:] * self.values[:-1]).mean()) < 5 / math.sqrt(self.n - 256)

    def test_the_tails_are_there(self) -> None:
        """P(|x| > 4) = 6.33e-5, so about 66 of 2^20; a uniform of few bits would cut the tail off."""
        expected = self.n * 6.334e-5
        assert abs((self.values.abs() > 4).sum() - expected) < 5 * math.sqrt(expected)


@pytest.mark.parametrize("width", [0, 1, 8])
def test_no_streams_give_no_rows(width: int) -> None:
    empty = gaussian_noise(0, 0, torch.empty(0, 2, dtype=torch.int64), width)
    assert empty.shape == (0, width) and empty.dtype == torch.float32


@pytest.mark.parametrize("first", [0, ONES])
@pytest.mark.parametrize("second", [0, ONES])
def test_extreme_words_give_finite_numbers(first: int, second: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The logarithm of 0 would be a NaN in a loss once in 2^32 draws, which no sample of this size finds."""
    words = tuple(torch.full((1, 1), word) for word in (first, second, first, second))
    monkeypatch.setattr(noise, "philox", lambda counter, key: words)
    values = gaussian_noise(0, 0, torch.zeros(1, 2, dtype=torch.int64), 4)
    assert values.isfinite().all() and values.abs().max() < 6
