from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ilvr_ds.config import DataSetConfig, Recipe, recipe_from_dict
from ilvr_ds.data.mixture import Mixture
from ilvr_ds.data.mixture_plan import MixturePlan
from ilvr_ds.data.plan import SamplePlan
from ilvr_ds.data.window import BadSample
from ilvr_ds.errors import UserError
from ilvr_ds.training.assembly.data import (
    _check_left_out,
    _check_mixture,
    build_held_out,
    build_loader,
)
from tests.data.packing import make_dataset
from tests.recipes import REQUIRED

ANY: Any = None


def state(mixture: list[tuple[str, int]], data: str = "abc", samples: int = 100) -> dict[str, Any]:
    """What a checkpoint keeps of a mixture."""
    rates = [rate for _, rate in mixture]
    return {"data": data, "mixture": [list(pair) for pair in mixture], "rates": rates, "samples an epoch": samples}


WAS = state([("big", 2), ("small", 1)])


@pytest.mark.parametrize(
    ("now", "words"),
    [
        (
            state([("big", 1), ("small", 1)]),
            "0.6667 big + 0.3333 small, 100 samples an epoch, this run has 0.5 big + 0.5",
        ),
        (state([("small", 2), ("big", 1)], "cab"), "this run has 0.6667 small + 0.3333 big"),
        (
            state([("big", 2), ("small", 1)], samples=50),
            "this run has 0.6667 big + 0.3333 small, 50 samples an epoch; go",
        ),
        (state([("big", 2), ("small", 1)], "def"), "100 samples an epoch (with other samples in it), this run has"),
        (
            {"data": "abc"},
            "this run has one data set and no mixture; go on with the mixture of then, or take another run",
        ),
    ],
)
def test_another_mixture_is_refused_with_what_was_and_what_is(now: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        _check_mixture(WAS, now)
    assert words in str(caught.value)
    if "mixture" not in now:
        with pytest.raises(UserError, match="was made with one data set and no mixture, this run has"):
            _check_mixture(now, WAS)


def test_a_renamed_set_and_one_data_set_as_before_go_on() -> None:
    _check_mixture(WAS, state([("large", 2), ("little", 1)]))
    _check_mixture({"data": "abc"}, {"data": "def"})  # the loader's own check says what differs


@pytest.mark.parametrize(
    ("saved", "remainder", "is_refused"),
    [
        ({"data": "abc"}, 2, True),
        ({"data": "abc"}, 0, False),  # its order is the same
        ({"data": "abc", "what an epoch leaves out": "drawn"}, 2, False),
        ({"data": "other"}, 2, False),  # refused for that
    ],
)
def test_a_checkpoint_of_the_order_of_an_older_version(saved: dict[str, Any], remainder: int, is_refused: bool) -> None:
    """Catches an epoch whose first half has one order and whose second another: samples twice and never."""
    inputs: Any = SimpleNamespace(
        plan=SamplePlan((8 + remainder,), 0, 4, 4), training=SimpleNamespace(fingerprint="abc")
    )
    now = build_loader(Recipe(), inputs, ANY, None).state_dict()
    if not is_refused:
        return _check_left_out(saved, now, inputs.plan)
    with pytest.raises(UserError, match=r"same 2 of 10 samples, .* take another run.name, with model.init_from"):
        _check_left_out(saved, now, inputs.plan)


def test_a_mixture_that_leaves_samples_for_the_next_epoch_goes_on_as_before() -> None:
    """Its order did not change: catches a refusal of every older checkpoint."""
    plan = MixturePlan(((10,), (5,)), (2, 1), 15, 0, 4, 4)
    inputs: Any = SimpleNamespace(plan=plan, training=SimpleNamespace(fingerprint="abc", names=("a", "b")))
    saved = build_loader(Recipe(), inputs, ANY, None).state_dict()
    assert plan.remainder == 3
    assert saved.keys() == {
        "step", "data", "run.seed", "data.lanes", "data.shuffle_buffer", "samples per step", "mixture", "rates",
        "samples an epoch",
    }  # fmt: skip
    build_loader(Recipe(), inputs, ANY, saved)


def test_bad_held_out_samples_are_judged_over_each_evaluation_alone(tmp_path: Path) -> None:
    """Catches samples that are bad in every evaluation, and add up to too many."""
    make_dataset(tmp_path / "set", 100)
    recipe = recipe_from_dict({**REQUIRED, "data": {"shards": "s", "max_bad_fraction": 0.1}})
    inputs: Any = SimpleNamespace(held_out=Mixture.open([DataSetConfig(str(tmp_path / "set"))]))
    data: Any = SimpleNamespace(held_out=SimpleNamespace(), held_out_sets=[])
    anything: Any = None
    held_out = build_held_out(recipe, inputs, anything, data, anything, anything)
    assert held_out is not None
    quarantine = held_out.quarantine.parts[0]
    quarantine._lines = None  # nothing is written
    for count in (2, 2, 3):
        held_out.quarantine.add([BadSample(n, "", "", 0, "why") for n in range(count)], [20], 0)
        assert held_out.quarantine.exceeded == (count == 3)
