"""Several data sets read as one: their samples are numbered through, set after set.

A data set that is trained on alone is a mixture of one set without a name, so that all else knows one kind of data.
Sets may have samples of the same id: in a mixture an id begins with the set's name, "comt/s1".
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from ilvr_ds.config import DataSetConfig
from ilvr_ds.data.features import FeatureSet, Rows
from ilvr_ds.data.reader import ShardReader
from ilvr_ds.data.sample import Sample
from ilvr_ds.data.shards import ShardSet, open_dataset
from ilvr_ds.errors import UserError


@dataclass(frozen=True, eq=False)
class Mixture:
    """Opened data sets and their names; a name is "" where there is one set and no mixture. Can be pickled."""

    sets: tuple[ShardSet, ...]
    names: tuple[str, ...] = ("",)

    @staticmethod
    def open(entries: Sequence[DataSetConfig], key: str = "data.shards") -> Mixture:
        """Open data sets of a recipe's `key`. Raises UserError, also where two of them are the same data."""
        mixture = Mixture(tuple(open_dataset(entry.path) for entry in entries), tuple(entry.name for entry in entries))
        for one, other in combinations(range(len(entries)), 2):
            if mixture.sets[one].fingerprint == mixture.sets[other].fingerprint:
                raise UserError(
                    f"{key}: {entries[one].path} and {entries[other].path} hold the same data; keep one of them"
                )
        return mixture

    @property
    def named(self) -> tuple[str, ...]:
        """Names of the sets by which metrics are split; none where there is no mixture."""
        return self.names if self.names[0] else ()

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """[sets]: number of the first sample of each set."""
        return np.cumsum([0, *map(len, self.sets[:-1])], dtype=np.int64)

    def __len__(self) -> int:
        return sum(map(len, self.sets))

    def find(self, number: int) -> tuple[int, int]:
        """The set of a sample, and the sample's number there."""
        if not 0 <= number < len(self):
            raise IndexError(f"sample {number} of {len(self)}")
        which = int(np.searchsorted(self.starts, number, side="right")) - 1
        return which, number - int(self.starts[which])

    @property
    def location(self) -> str:
        """Where the data lie, for messages."""
        return ", ".join(shards.location for shards in self.sets)

    @property
    def fingerprint(self) -> str:
        """A sha256 of all sets' descriptions in their order; of one set its own."""
        if not self.named:
            return self.sets[0].fingerprint
        return hashlib.sha256(" ".join(shards.fingerprint for shards in self.sets).encode()).hexdigest()

    @property
    def groups(self) -> dict[str, int]:
        """Samples of each kind of task, of all sets."""
        return dict(sum((Counter(shards.manifest.groups) for shards in self.sets), Counter()))

    @property
    def tokens(self) -> NDArray[np.uint32]:
        """[samples]: length of each sample in tokens; 0 where it was not measured."""
        return np.concatenate([shards.tokens for shards in self.sets])

    @property
    def longest_tokens(self) -> int:
        """Length of the longest sample; 0 where lengths of a set were not measured."""
        longest = [shards.manifest.longest_tokens for shards in self.sets]
        return max(longest) if all(longest) else 0

    def check_measured_alike(self) -> None:
        """Raise UserError where lengths were measured with one tokenizer or setting in one set, another in another."""
        measured = [
            (name, shards.manifest.tokens_measured_with)
            for name, shards in zip(self.names, self.sets, strict=True)
            if shards.manifest.tokens_measured_with is not None
        ]
        for name, settings in measured[1:]:
            first, wanted = measured[0]
            for key in {**wanted, **settings}:
                if wanted.get(key) != settings.get(key):
                    raise UserError(
                        f"data.shards: {first} was packed with {key} = {wanted.get(key)}, {name} with "
                        f"{settings.get(key)}; pack both with this recipe (ilvr-ds pack --config)"
                    )


class MixtureReader:
    """Random access to the samples of a mixture, like that of a ShardReader to those of one set."""

    def __init__(self, mixture: Mixture) -> None:
        self.mixture = mixture
        self._readers = [ShardReader(shards) for shards in mixture.sets]

    def __len__(self) -> int:
        return len(self.mixture)

    @property
    def location(self) -> str:
        """Where the data lie, for messages."""
        return self.mixture.location

    def read(self, sample_number: int) -> Sample:
        """The sample with this number in the mixture, its id with the set's name before it. Raises UserError."""
        which, number = self.mixture.find(sample_number)
        sample, name = self._readers[which].read(number), self.mixture.names[which]
        return replace(sample, id=f"{name}/{sample.id}") if name else sample

    def place(self, sample_number: int) -> tuple[str, int]:
        """Name of a sample's shard in its set, and its first byte there."""
        which, number = self.mixture.find(sample_number)
        return self._readers[which].place(number)

    @property
    def retries(self) -> int:
        """Reads that this process repeated after a transient fault."""
        return sum(reader.retries for reader in self._readers)


class MixtureFeatures:
    """The stored features of a mixture's sets, read like those of one (FeatureSet). Can be pickled."""

    def __init__(self, mixture: Mixture, features: Sequence[FeatureSet]) -> None:
        self.mixture = mixture
        self.features = features

    def read(self, sample_number: int, inputs: int, helpers: int) -> Rows:
        """Features [inputs + helpers, D] of a sample. Raises UserError and SampleError."""
        which, number = self.mixture.find(sample_number)
        return self.features[which].read(number, inputs, helpers)

    def empty(self) -> Rows:
        """The features [0, D] of a sample without images."""
        return self.features[0].empty()

    @property
    def retries(self) -> int:
        """Reads that this process repeated after a transient fault."""
        return sum(one.retries for one in self.features)
