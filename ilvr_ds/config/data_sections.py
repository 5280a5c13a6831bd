"""The section `data` of a recipe, and an entry of a mixture. Defaults and meanings stand here, and only here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

REQUIRED = "<required>"


@dataclass(frozen=True)
class DataSetConfig:
    """One data set of a mixture: an entry of the list `data.shards`."""

    path: str
    """Folder or http(s) address of a data set that `ilvr-ds pack` wrote."""
    name: str = ""
    """What metrics and records call it; left out: the part of `path` that tells it from the others."""
    weight: float | None = None
    """Its share of every step, relative to the other weights. An epoch of the mixture then is as many samples as all
    sets have: a small set may come more than once in it, and of a large one a part may be left for the next."""
    epochs: float | None = None
    """Instead of `weight`, for every set: how often it is passed in an epoch of the mixture; left out: once."""
    eval_shards: str | None = None
    """Held-out data of this set."""
    features: str | None = None
    """Like `data.features`, for this set; all sets have them, or none."""
    eval_features: str | None = None
    """Like `data.eval_features`, for this set's `eval_shards`."""


@dataclass(frozen=True)
class DataConfig:
    """What is read, and how it becomes tokens."""

    shards: str | tuple[DataSetConfig, ...] = REQUIRED
    """Folder or http(s) address of a data set that `ilvr-ds pack` wrote. Or a mixture: a list of such addresses, or of
    `{path, name, weight or epochs, eval_shards, features, eval_features}`, of which all but `path` may be left out
    (docs/data.md)."""
    eval_shards: str | None = None
    """Held-out data in the same form; null: no evaluation during training, or each set of a mixture on its own."""
    features: str | None = None
    """Folder or http(s) address of the vision features that `ilvr-ds encode` stored for `shards`. They are read instead
    of pixels, and the vision tower is not loaded. null: images pass through the tower in every step."""
    eval_features: str | None = None
    """The same for `eval_shards`; needed if `features` and `eval_shards` are both set, refused otherwise."""
    lanes: int = 8
    """Independent streams of the sample order. The world size must divide it, and it must divide the global batch."""
    shuffle_buffer: int = 4096
    """Each lane is shuffled this many samples at a time."""
    max_tokens: int = 4096
    """Longest sample in tokens; longer ones are refused, never truncated."""
    max_image_pixels: int = 1_003_520
    """Larger images are scaled down to this many pixels (1,280 merged patches of 28x28)."""
    packing: bool = True
    """Lay the samples of a micro-batch end to end in one row, without padding. Has no effect in stage 2 with
    `train.latent_gradient: full`."""
    padding_side: Literal["right", "left"] = "right"
    """Without packing: the side on which short sequences are padded. right needs no attention mask and is faster."""
    blank_images: bool = False
    """Replace every image with a grey one of the same size: a control run that sees nothing."""
    num_workers: int = 2
    """Loader processes per rank."""
    max_bad_fraction: float = 0.01
    """Stand-ins without a loss replace samples that cannot be read or decoded; quarantine.jsonl lists them. The run
    stops when they exceed this fraction of the last 1,000 samples (of the data set, if that is smaller), or of the
    held-out samples of an evaluation; in a mixture, of any of its sets; 0: at the first."""

    @property
    def is_mixture(self) -> bool:
        """Whether `shards` is a list."""
        return not isinstance(self.shards, str)

    @property
    def sets(self) -> tuple[DataSetConfig, ...]:
        """The data sets that are trained on; without a mixture one without a name."""
        if isinstance(self.shards, str):
            return (DataSetConfig(self.shards, features=self.features),)
        return self.shards

    @property
    def held_out_sets(self) -> tuple[DataSetConfig, ...]:
        """The held-out data, with their own features: those of a mixture's sets by name, or `eval_shards` without."""
        if self.eval_shards is not None:
            return (DataSetConfig(self.eval_shards, features=self.eval_features),)
        return tuple(
            DataSetConfig(entry.eval_shards, entry.name, features=entry.eval_features)
            for entry in self.sets
            if entry.eval_shards is not None
        )

    @property
    def has_features(self) -> bool:
        """Whether vision features are stored, and no tower is needed."""
        return any(entry.features is not None for entry in self.sets)
