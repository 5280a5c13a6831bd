from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ilvr_ds.config import recipe_from_dict
from ilvr_ds.training.assembly.data import longest_samples

KNOWN = {"run": {"name": "r"}, "data": {"shards": "s"}, "model": {"path": "m"}, "deepspeed": {"config": "d"}}
LENGTHS = np.array([300, 1000, 200, 900, 100, 800, 700], dtype=np.uint32)


def rehearsed(lengths: Any = LENGTHS, **train: int) -> list[list[int]]:
    recipe = recipe_from_dict({**KNOWN, "train": train})
    return [numbers.tolist() for numbers in longest_samples(recipe, SimpleNamespace(tokens=lengths))]  # type: ignore[arg-type]


def test_the_longest_samples_are_rehearsed_once_each() -> None:
    """Catches a window of nothing but the longest sample, which no step has and which may not fit."""
    assert rehearsed(micro_batch_size=2, grad_accum_steps=2) == [[1, 3], [5, 6]]


@pytest.mark.parametrize(
    ("budget", "expected"),
    [(1000, [[1], [3], [5], [6]]), (1900, [[1, 3], [5, 6]]), (2700, [[1, 3, 5], [6]]), (9999, [[1, 3, 5, 6]])],
)
def test_micro_batches_are_filled_by_tokens(budget: int, expected: list[list[int]]) -> None:
    assert rehearsed(micro_batch_size=2, grad_accum_steps=2, micro_batch_tokens=budget) == expected


def test_no_window_has_more_tokens() -> None:
    lengths = np.random.default_rng(0).integers(1, 4096, 500)
    windows = np.random.default_rng(1).permutation(500).reshape(-1, 20)
    numbers = np.concatenate(rehearsed(lengths, micro_batch_size=4, grad_accum_steps=5))
    assert len(set(numbers)) == 20
    assert lengths[windows].sum(1).max() <= lengths[numbers].sum() < 20 * lengths.max()


def test_a_small_data_set_fills_a_window() -> None:
    assert rehearsed(LENGTHS[:2], micro_batch_size=4, grad_accum_steps=1) == [[1, 0, 1, 0]]
