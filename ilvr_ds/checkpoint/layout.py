"""What decides which elements of a student's state lie where on a rank, besides the number of ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from ilvr_ds.errors import UserError, counted

_KEYS = {
    1: ("round_robin_gradients", "parameter_alignment"),
    2: ("round_robin_gradients", "parameter_alignment"),
    3: ("sub_group_size",),
}


@dataclass(frozen=True)
class Layout:
    """A ZeRO stage, and the settings beside it that decide the layout under it."""

    zero_stage: int
    settings: dict[str, Any]
    """By the names that they have in `zero_optimization`"""

    @staticmethod
    def of(zero: Mapping[str, Any]) -> Layout:
        """From DeepSpeed's section `zero_optimization`; what it leaves out has DeepSpeed's default."""
        checked = DeepSpeedZeroConfig(**zero)
        stage, known = int(checked.stage), DeepSpeedZeroConfig.model_fields  # parameter_alignment came with 0.19.5
        return Layout(stage, {key: getattr(checked, key) for key in _KEYS.get(stage, ()) if key in known})


def saved_layout(path: Path, state: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a checkpoint's layout, by its `state.json`, or by DeepSpeed's own file if it is older than that.

    Raises UserError where no other job can read its order of the weights.
    """
    zero: dict[str, Any] = {"stage": state["zero_stage"], **state.get("layout", {})}
    if "layout" not in state:
        zero = _settings_of(path).get("zero_optimization", zero)
    layout = Layout.of(zero).settings  # a key that came later had its default
    if layout.get("round_robin_gradients") and state["world_size"] > 1:
        raise UserError(
            f"{path}: made by {counted(state['world_size'], 'rank')} with zero_optimization.round_robin_gradients, "
            "with which the teacher followed wrong weights; begin anew under another run.name"
        )
    return layout


def _settings_of(path: Path) -> dict[str, Any]:
    """DeepSpeed's settings in a checkpoint; none where it has no such file."""
    file = next((path / "student").glob("*mp_rank_00_model_states.pt"), None)
    if file is None:
        return {}
    found: dict[str, dict[str, Any]] = torch.load(file, map_location="cpu", mmap=True, weights_only=False)
    return found.get("ds_config", {})
