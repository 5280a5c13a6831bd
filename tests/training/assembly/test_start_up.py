"""What is said of a run before its weights load."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from ilvr_ds.config import recipe_from_dict
from ilvr_ds.training.assembly.start_up import _evaluated_on
from tests.recipes import REQUIRED


@pytest.mark.parametrize(("sizes", "name"), [([8, 512], "abc, 512"), ([8, 513], "abc, 512 evenly")])
def test_an_old_best_counts_where_the_samples_are_those_of_before(sizes: list[int], name: str) -> None:
    """A part was the first samples, and is now taken evenly; where all are taken nothing has changed."""
    held_out = SimpleNamespace(fingerprint="abc", sets=[range(size) for size in sizes])
    inputs: Any = SimpleNamespace(held_out=held_out)
    assert _evaluated_on(recipe_from_dict(REQUIRED), inputs) == name
    inputs.held_out = None
    assert _evaluated_on(recipe_from_dict(REQUIRED), inputs) == ""
