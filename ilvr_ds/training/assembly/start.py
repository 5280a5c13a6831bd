"""Where a run starts: from a checkpoint, from the weights of another run, or from the base model alone."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ilvr_ds import dist
from ilvr_ds.base_model import model_on_host
from ilvr_ds.checkpoint.compatible import LAYERS, check_fits, check_frozen_is_the_same, commit_of_base
from ilvr_ds.checkpoint.find import find_checkpoint
from ilvr_ds.checkpoint.initial import find_initial
from ilvr_ds.checkpoint.layout import Layout
from ilvr_ds.checkpoint.reshard import needs_resharding, reshard
from ilvr_ds.config import Recipe
from ilvr_ds.engine.settings import layout_of


@dataclass(frozen=True)
class Start:
    """What a run starts from; nothing is loaded yet."""

    checkpoint: Path | None
    """The run goes on from its whole state: weights, optimizer, position in the data."""
    initial: Path | None
    """A checkpoint of another run, whose weights alone are taken (`model.init_from`)."""
    model_folder: str
    """The base model on this host."""
    state: dict[str, Any] = field(default_factory=dict)
    """What `state.json` of `checkpoint` says."""

    @staticmethod
    def find(recipe: Recipe) -> Start:
        """Look for a checkpoint and the base model, and fetch that (collective). Raises UserError."""
        checkpoint = find_checkpoint(recipe)
        initial = None if checkpoint else find_initial(recipe)
        source, name = checkpoint or initial, recipe.model.path
        folder = model_on_host(name, dist.decided_by_main(lambda: commit_of_base(source, name)))
        return Start(checkpoint, initial, folder, check_fits(checkpoint, recipe) if checkpoint else {})

    @property
    def source(self) -> Path | None:
        """The checkpoint that weights come from, if any."""
        return self.checkpoint or self.initial

    def on_this_host(self, recipe: Recipe) -> Recipe:
        """The recipe with the base model's folder as `model.path`."""
        return replace(recipe, model=replace(recipe.model, path=self.model_folder))

    def is_resharded(self, layout: Layout) -> bool:
        """Whether the checkpoint was saved by another number of ranks, or in another layout."""
        return self.checkpoint is not None and needs_resharding(self.state, layout)

    def prepare_checkpoint(self, recipe: Recipe, file_settings: dict[str, Any]) -> dict[str, Any]:
        """Convert the checkpoint where this job has other shards; returns DeepSpeed's settings to load it under
        (collective). Raises UserError."""
        layout = layout_of(file_settings)
        if self.checkpoint is None or not self.is_resharded(layout):
            return file_settings
        reshard(self.checkpoint, self.state, layout, recipe)
        return {**file_settings, "checkpoint": {"load_universal": True}}

    def check_frozen(self, frozen: dict[str, str]) -> None:
        """Raise UserError where frozen weights (their fingerprints, by name) are not those of the checkpoint's run."""
        if self.source is None:
            return
        if self.checkpoint is None:  # another run's weights may be trained on with another tower
            frozen = {name: fingerprint for name, fingerprint in frozen.items() if name == LAYERS}
        check_frozen_is_the_same(self.source, frozen, self.model_folder)
