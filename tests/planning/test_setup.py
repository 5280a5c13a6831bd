"""What a recipe means for memory and time."""

from __future__ import annotations

import json

import pytest

from ilvr_ds.config import recipe_from_dict
from ilvr_ds.planning.bound import bound_time
from ilvr_ds.planning.chips import CHIPS
from ilvr_ds.planning.geometry import KNOWN
from ilvr_ds.planning.memory import predict_memory
from ilvr_ds.planning.report import _choices
from ilvr_ds.planning.setup import SampleSize, Setup, Zero
from tests.ranks import ROOT
from tests.recipes import REQUIRED

ZERO3 = Zero.of(json.loads((ROOT / "ds_configs/zero3.json").read_text()))


@pytest.mark.parametrize("offload", ["cpu", "none"])
@pytest.mark.parametrize("stage", [1, 2])
def test_where_change_alone_decides_nothing_of_a_teacher_is_planned(stage: int, offload: str) -> None:
    """Neither memory on GPU and host nor time; with one the plan names the choice, and what it gives is the same."""
    plans = {}
    for unchanged in ("query", "none"):
        selection = {"pool": "changed", "by": "change", "unchanged": unchanged}
        train, teacher = {"stage": stage}, {"offload": offload}
        recipe = recipe_from_dict({**REQUIRED, "selection": selection, "train": train, "teacher": teacher})
        plans[unchanged] = Setup.of(recipe, ZERO3, KNOWN["7b"], 8, SampleSize())
    without = plans["none"]
    memory, bound = predict_memory(without), bound_time(without, CHIPS["H200"])
    assert memory.checkpoint_copy < predict_memory(plans["query"]).checkpoint_copy
    terms = [*memory.resident, *memory.moments, *memory.host, *bound.parts]
    assert not [term for term in terms if "teacher" in term or "momentum" in term]
    assert bound.flops < 0.85 * bound_time(plans["query"], CHIPS["H200"]).flops
    assert dict(_choices(plans["query"]))["selection.unchanged=none"] == without
    assert "selection.unchanged=none" not in dict(_choices(without))


@pytest.mark.parametrize(
    ("budget", "size", "accum"), [(0, 4, 2), (8192, 4, 2), (4120, 4, 2), (4119, 3, 3), (16_384, 8, 1), (1030, 1, 8)]
)
def test_micro_batches_that_are_filled_by_tokens(budget: int, size: int, accum: int) -> None:
    """8 samples of 1,030 tokens a step: as few micro-batches as hold them, and never fewer samples than there are."""
    train = {"micro_batch_size": 4, "grad_accum_steps": 2, "micro_batch_tokens": budget}
    setup = Setup.of(recipe_from_dict({**REQUIRED, "train": train}), ZERO3, KNOWN["7b"], 8, SampleSize(tokens=1030))
    assert (setup.micro_batch_size, setup.grad_accum_steps) == (size, accum)
    assert setup.window_samples >= 8
