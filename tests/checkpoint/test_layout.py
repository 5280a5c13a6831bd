"""The layout that a checkpoint was saved in, by its own word or, if it is older than that, by DeepSpeed's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ilvr_ds.checkpoint.compatible import check_fits
from ilvr_ds.checkpoint.files import saved_state
from ilvr_ds.checkpoint.layout import Layout, saved_layout
from ilvr_ds.errors import UserError
from tests.checkpoint.stand_ins import recipe, save


def older(path: Path, zero: dict[str, Any]) -> dict[str, Any]:
    """The state of a checkpoint in which only DeepSpeed's file says under which settings it was saved."""
    (path / "student").mkdir(parents=True)
    torch.save({"ds_config": {"zero_optimization": zero}}, path / "student/mp_rank_00_model_states.pt")
    return {"world_size": 2, "zero_stage": zero["stage"]}


def test_a_checkpoint_keeps_its_layout(folder: Path) -> None:
    path = save(folder, 1)
    assert saved_state(path)["layout"] == {"sub_group_size": 10**9}
    assert check_fits(path, recipe(folder, "auto"))["layout"] == Layout.of({"stage": 3}).settings


def test_an_older_checkpoint_has_what_deepspeed_was_told(tmp_path: Path) -> None:
    """Catches defaults in its place, with which another sub-group size would not be noticed."""
    zero = {"stage": 3, "sub_group_size": 20000}
    assert saved_layout(tmp_path, older(tmp_path, zero)) == {"sub_group_size": 20000}


def test_an_older_checkpoint_in_another_order_of_weights_is_a_mistake(tmp_path: Path) -> None:
    """Catches weights that are copied by position into another order, without an error."""
    state = older(tmp_path, {"stage": 2, "round_robin_gradients": True})
    with pytest.raises(UserError, match=r"made by 2 ranks with zero_optimization\.round_robin_gradients, with"):
        saved_layout(tmp_path, state)
    assert saved_layout(tmp_path, {**state, "world_size": 1})["round_robin_gradients"]
