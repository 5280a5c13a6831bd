"""The step that is rehearsed: as large as any, and no larger."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ilvr_ds.config import TrainConfig
from ilvr_ds.data.packing import PackedNumbers
from ilvr_ds.data.plan import SamplePlan
from ilvr_ds.training.assembly.longest import longest_samples

LENGTHS = np.array([300, 1000, 200, 900, 100, 800, 700])


def rehearsed(lengths: Any = LENGTHS, **train: int) -> list[list[int]]:
    return [numbers.tolist() for numbers in longest_samples(TrainConfig(**train), lengths)]


def test_the_longest_samples_are_rehearsed_once_each() -> None:
    """Catches a window of nothing but the longest sample, which no step has and which may not fit."""
    assert rehearsed(micro_batch_size=2, grad_accum_steps=2) == [[1, 3], [5, 6]]


@pytest.mark.parametrize(
    ("budget", "expected"),
    [(1000, [[1], [3], [5], [6]]), (1900, [[1, 3], [5, 6]]), (2700, [[1, 3, 5], [6]]), (9999, [[1, 3, 5, 6]])],
)
def test_micro_batches_are_filled_by_tokens(budget: int, expected: list[list[int]]) -> None:
    assert rehearsed(micro_batch_size=2, grad_accum_steps=2, micro_batch_tokens=budget) == expected


@pytest.mark.parametrize("longest", [520, 700, 1000])
def test_no_micro_batch_filled_by_tokens_has_more(longest: int) -> None:
    """Catches a rehearsal of the longest sample alone, where several shorter ones fill a micro-batch."""
    lengths = np.random.default_rng(0).integers(50, longest, 400)
    lengths[:30] = longest
    batches = rehearsed(lengths, micro_batch_size=2, grad_accum_steps=5, micro_batch_tokens=1000)
    real = PackedNumbers(SamplePlan((400,), 0, 2, 20), 0, 2, lengths, 1000)
    largest = max(lengths[batch].sum() for step in range(20) for batch in real(step))
    assert largest < lengths[batches[0]].sum() + lengths.min() and lengths[batches[0]].sum() <= 1000
    numbers = np.concatenate(batches)
    assert len(set(numbers)) == len(numbers) == 10 and max(lengths[batch].sum() for batch in batches) <= 1000


def test_no_window_has_more_tokens() -> None:
    lengths = np.random.default_rng(0).integers(1, 4096, 500)
    windows = np.random.default_rng(1).permutation(500).reshape(-1, 20)
    numbers = np.concatenate(rehearsed(lengths, micro_batch_size=4, grad_accum_steps=5))
    assert len(set(numbers)) == 20
    assert lengths[windows].sum(1).max() <= lengths[numbers].sum() < 20 * lengths.max()


def test_a_small_data_set_fills_a_window() -> None:
    assert rehearsed(LENGTHS[:2], micro_batch_size=4, grad_accum_steps=1) == [[1, 0, 1, 0]]
    filled = rehearsed(LENGTHS[:2], micro_batch_size=4, grad_accum_steps=1, micro_batch_tokens=1300)
    assert filled == [[1, 0], [1, 0]]


@pytest.mark.parametrize(
    ("budget", "expected"),
    [(1000, [[1], [3], [5], [6]]), (1700, [[5, 6], [1], [3]]), (1800, [[3, 5], [1], [6]]), (9999, [[1, 3, 5, 6]])],
)
def test_own_latents_have_a_row_each_in_the_budget(budget: int, expected: list[list[int]]) -> None:
    """The first has the most rows times columns: two of 800 in place of one of 1,000."""
    assert rehearsed(stage=2, micro_batch_size=2, grad_accum_steps=2, micro_batch_tokens=budget) == expected


@pytest.mark.parametrize("longest", [520, 700, 1000])
def test_no_micro_batch_of_own_latents_has_more_rows_times_columns(longest: int) -> None:
    """Catches a rehearsal in which one long sample is alone, though shorter ones fill a micro-batch better."""
    lengths = np.random.default_rng(0).integers(50, longest, 400)
    batches = rehearsed(lengths, stage=2, micro_batch_size=2, grad_accum_steps=5, micro_batch_tokens=1000)
    real = PackedNumbers(SamplePlan((400,), 0, 2, 20), 0, 2, lengths, 1000, has_rows=True)
    areas = [len(batch) * lengths[batch].max() for step in range(20) for batch in real(step)]
    assert max(areas) <= len(batches[0]) * lengths[batches[0]].max() <= 1000
    numbers = np.concatenate(batches)
    assert len(set(numbers)) == len(numbers) == 10
