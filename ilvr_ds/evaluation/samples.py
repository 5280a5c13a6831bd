"""What is evaluated on: samples by number, packed or of a published benchmark."""

from __future__ import annotations

from typing import Protocol

from ilvr_ds.data.reader import ShardReader
from ilvr_ds.data.sample import Sample
from ilvr_ds.data.shards import open_dataset
from ilvr_ds.errors import UserError
from ilvr_ds.evaluation.benchmarks import Benchmark
from ilvr_ds.evaluation.published.benchmark import Published
from ilvr_ds.evaluation.published.reader import open_published


class Samples(Protocol):
    """Random access to samples."""

    def __len__(self) -> int: ...

    def read(self, number: int, /) -> Sample:
        """The sample with this number, from 0; raises UserError where it is damaged."""

    @property
    def location(self) -> str:
        """Where they lie, for messages."""

    @property
    def fingerprint(self) -> str:
        """The same for the same samples."""


def open_samples(benchmark: Benchmark, shards: str | None, data: str | None) -> Samples:
    """Open `shards`, or for a published benchmark its `data`, None for the usual hub's (collective).

    Raises UserError where the other of the two is given, or what is given cannot be read.
    """
    if isinstance(benchmark, Published):
        if shards:
            raise UserError(
                f"--shards: {benchmark.name} is read from its own data set; give a copy of {benchmark.hub} by --data, "
                "or neither"
            )
        return open_published(benchmark, data)
    if data:
        raise UserError(f"--data: is for published benchmarks; {benchmark.name} is judged on --shards")
    if not shards:
        raise UserError(f"--shards: is missing; {benchmark.name} is judged on a data set that `ilvr-ds pack` wrote")
    return ShardReader(open_dataset(shards))
