"""What a recipe means for memory and time."""

from __future__ import annotations

import json

import pytest

from ilvr_ds.config import recipe_from_dict
from ilvr_ds.planning.geometry import KNOWN
from ilvr_ds.planning.setup import SampleSize, Setup, Zero
from tests.ranks import ROOT

ZERO3 = Zero.of(json.loads((ROOT / "ds_configs/zero3.json").read_text()))


@pytest.mark.parametrize(
    ("budget", "size", "accum"), [(0, 4, 2), (8192, 4, 2), (4120, 4, 2), (4119, 3, 3), (16_384, 8, 1), (1030, 1, 8)]
)
def test_micro_batches_that_are_filled_by_tokens(budget: int, size: int, accum: int) -> None:
    """8 samples of 1,030 tokens a step: as few micro-batches as hold them, and never fewer samples than there are."""
    train = {"micro_batch_size": 4, "grad_accum_steps": 2, "micro_batch_tokens": budget}
    known = {"run": {"name": "r"}, "data": {"shards": "s"}, "model": {"path": "m"}, "deepspeed": {"config": "d"}}
    setup = Setup.of(recipe_from_dict({**known, "train": train}), ZERO3, KNOWN["7b"], 8, SampleSize(tokens=1030))
    assert (setup.micro_batch_size, setup.grad_accum_steps) == (size, accum)
    assert setup.window_samples >= 8
