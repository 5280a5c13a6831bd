"""Reads single samples of a packed data set, in any order."""

from __future__ import annotations

import zlib

import numpy as np

from ilvr_ds.data.members import MemberError, decode_members, key_of
from ilvr_ds.data.sample import Sample
from ilvr_ds.data.shards import ShardSet
from ilvr_ds.errors import UserError


class DamagedSampleError(UserError):
    """The bytes read are not those of the sample that was packed."""


class ShardReader:
    """Random access to the samples of `shard_set` by one range read each.

    Can be pickled and forked; files and connections are opened at the first read of each process.
    """

    def __init__(self, shard_set: ShardSet) -> None:
        self.shard_set = shard_set
        self._ends = np.cumsum(shard_set.shard_sizes)

    def __len__(self) -> int:
        return len(self.shard_set)

    @property
    def location(self) -> str:
        """Where the data set lies, for messages."""
        return self.shard_set.location

    @property
    def fingerprint(self) -> str:
        """Of everything that was packed."""
        return self.shard_set.fingerprint

    def read(self, sample_number: int) -> Sample:
        """The sample with this number (0 to len - 1, in packed order); its images are not decoded.

        Raises UserError with shard and key where bytes are missing, DamagedSampleError where they are damaged.
        """
        shard, offset = self.place(sample_number)
        entry = self.shard_set.index[sample_number]
        data = self.shard_set.storage.read_range(shard, offset, int(entry["length"]))
        key = key_of(sample_number)
        try:
            sample = decode_members(data, key)  # before the checksum: it can say what is wrong
            if zlib.crc32(data) != entry["crc32"]:
                raise MemberError("its bytes are not those that were packed")
        except MemberError as error:
            raise DamagedSampleError(
                f"{self.location}/{shard}: sample {key}: {error}; copy or pack the data again"
            ) from error
        return sample

    def place(self, sample_number: int) -> tuple[str, int]:
        """Name of a sample's shard, and its first byte there."""
        if not 0 <= sample_number < len(self):
            raise IndexError(f"sample {sample_number} of {len(self)}")
        shard = self.shard_set.manifest.shards[int(np.searchsorted(self._ends, sample_number, side="right"))]
        return shard.name, int(self.shard_set.index[sample_number]["offset"])

    @property
    def retries(self) -> int:
        """Reads that this process repeated after a transient fault."""
        return self.shard_set.storage.retries
