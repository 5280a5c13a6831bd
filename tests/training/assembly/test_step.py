from __future__ import annotations

import pytest

from ilvr_ds.config import recipe_from_dict
from ilvr_ds.training.assembly.step import _micro_batches_at_once
from tests.recipes import REQUIRED


@pytest.mark.parametrize(
    ("settings", "longest", "expected"),
    [
        ({}, 1000, 8),
        ({}, 2001, 3),
        ({}, 16_000, 1),
        ({"micro_batch_tokens": 5000}, 2000, 3),
        ({"micro_batch_tokens": 16_001}, 2000, 1),
    ],
)
def test_the_teacher_reads_as_much_as_cannot_be_too_much(settings: dict[str, int], longest: int, expected: int) -> None:
    train = {"micro_batch_size": 2, "grad_accum_steps": 8, **settings}
    recipe = recipe_from_dict({**REQUIRED, "train": train, "teacher": {"max_tokens": 16_000}})
    assert _micro_batches_at_once(recipe, longest) == expected
