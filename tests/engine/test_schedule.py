from __future__ import annotations

from typing import Any

import pytest

from ilvr_ds.config import OptimConfig
from ilvr_ds.engine.schedule import learning_rate


def rates(total: int, steps: range, **settings: Any) -> list[float]:
    return [learning_rate(OptimConfig(lr=2.0, **settings), step, total) for step in steps]


def test_the_warm_up_rises_in_equal_parts_to_the_peak() -> None:
    for schedule in ("constant", "linear", "cosine"):
        assert rates(100, range(5), warmup_steps=4, schedule=schedule) == [0.5, 1.0, 1.5, 2.0, 2.0]


def test_constant_stays_at_the_peak() -> None:
    assert set(rates(10, range(12), schedule="constant")) == {2.0}


def test_linear_falls_in_equal_parts_to_the_final_ratio() -> None:
    found = rates(6, range(2, 7), warmup_steps=2, schedule="linear", min_lr_ratio=0.25)
    assert found == pytest.approx([2.0, 1.625, 1.25, 0.875, 0.5], abs=1e-12)


def test_cosine_falls_slowly_then_fast_then_slowly() -> None:
    found = rates(4, range(5), schedule="cosine")
    assert found == pytest.approx([2.0, 1 + 0.5**0.5, 1.0, 1 - 0.5**0.5, 0.0], abs=1e-12)


def test_cosine_ends_at_the_final_ratio() -> None:
    assert rates(4, range(2, 5, 2), schedule="cosine", min_lr_ratio=0.5) == pytest.approx([1.5, 1.0], abs=1e-12)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_steps_past_the_end_keep_the_final_rate(schedule: str) -> None:
    assert rates(4, range(5, 100), schedule=schedule, min_lr_ratio=0.1) == pytest.approx([0.2] * 95)


def test_a_warm_up_longer_than_the_run_is_no_error() -> None:
    assert rates(2, range(3), warmup_steps=8) == [0.25, 0.5, 0.75]
