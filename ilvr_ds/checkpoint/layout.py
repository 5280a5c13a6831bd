"""What decides which elements of a student's state lie where on a rank, besides the number of ranks."""

from __future__ import annotations

from collections.abc import Mapping
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


class ZeroStage(int):
    """A ZeRO stage with the settings beside it that decide the layout under it; equal to the plain number."""

    layout: dict[str, Any]
    """By the names that they have in `zero_optimization`"""

    @staticmethod
    def of(zero: Mapping[str, Any]) -> ZeroStage:
        """From DeepSpeed's section `zero_optimization`; what it leaves out has DeepSpeed's default."""
        settings = DeepSpeedZeroConfig(**zero)
        stage = ZeroStage(settings.stage)
        known = DeepSpeedZeroConfig.model_fields  # parameter_alignment came with DeepSpeed 0.19.5 or later
        stage.layout = {key: getattr(settings, key) for key in _KEYS.get(stage, ()) if key in known}
        return stage


def layout_of(zero_stage: int) -> dict[str, Any]:
    """The settings that decide the layout; DeepSpeed's defaults for a plain number."""
    stage = zero_stage if isinstance(zero_stage, ZeroStage) else ZeroStage.of({"stage": zero_stage})
    return stage.layout


def saved_layout(path: Path, state: Mapping[str, Any]) -> dict[str, Any]:
    """The same of a checkpoint, by its `state.json`, or by DeepSpeed's own file where that is older than this key.

    Raises UserError where no other job can read its order of the weights.
    """
    stage: int = state["zero_stage"]
    if "layout" in state:
        layout: dict[str, Any] = layout_of(stage) | state["layout"]  # a key that came later had its default
    else:
        layout = ZeroStage.of(_settings_of(path).get("zero_optimization", {"stage": stage})).layout
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
