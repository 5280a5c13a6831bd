from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ilvr_ds.config import SelectionConfig
from ilvr_ds.distill.query import Context
from ilvr_ds.distill.teacher import MomentumTeacher


@pytest.mark.parametrize(
    ("at_once", "expected"),
    [
        (1, [range(0, 2), range(2, 5), range(5, 6), range(6, 8), range(8, 9)]),
        (2, [range(0, 5), range(5, 8), range(8, 9)]),
        (5, [range(0, 9)]),
        (99, [range(0, 9)]),
    ],
)
def test_whole_micro_batches_are_read_together(at_once: int, expected: list[range]) -> None:
    """Their number is the same on all ranks, and so is the number of calls."""
    asked: list[Any] = []

    def network(tokens: Any, features: Any, context: Any, pieces: list[range]) -> Context:
        asked.extend(pieces)
        return Context(torch.zeros(0), torch.zeros(0), torch.zeros(0))

    teacher = MomentumTeacher(network, SimpleNamespace(), lambda: iter(()), SelectionConfig(), 2, at_once)  # type: ignore[arg-type]
    micro_batches = [SimpleNamespace(ids=("sample",) * samples) for samples in (2, 3, 1, 2, 1)]
    window: Any = SimpleNamespace(tokens=None, context=None, micro_batches=micro_batches)
    teacher.read(window, torch.zeros(0))
    assert asked == expected
