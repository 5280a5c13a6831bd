"""What tests of export run on ranks."""

from __future__ import annotations

from pathlib import Path

from ilvr_ds.config import load_recipe
from ilvr_ds.training.assembly import assemble
from ilvr_ds.training.engine import init_process_group
from ilvr_ds.training.trainer import Trainer


def train(recipe: str, overrides: list[str]) -> None:
    """A run that leaves a checkpoint; nothing is gathered, so frozen weights do no harm."""
    init_process_group()
    parts = assemble(load_recipe(recipe, overrides), Path(recipe))
    Trainer(parts).fit()
    parts.tracker.close("FINISHED")
