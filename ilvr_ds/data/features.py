"""Stored vision features of a packed data set: `ilvr-ds encode` writes them, training reads them instead of pixels.

    features.json          data set, tower and image settings that they are of; sizes and sha256 of all other files
    shard-000000.rows      merged features [rows, D], bf16 (little endian): sample by sample, of each sample first its
                           input images, then its helper images
    shard-000000.rowidx    24 bytes a sample: first row uint64; rows, then crc32, of input and of helper images uint32
                           (little endian)
    shard-000000.json      the shard's entry in features.json, written last: the shard is whole

Rows are uint16 here, because numpy has no bfloat16.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ilvr_ds.data.sample import SampleError
from ilvr_ds.data.shards import ShardInfo, ShardSet
from ilvr_ds.data.storage import Storage, open_storage
from ilvr_ds.errors import UserError

VERSION = 1
FEATURES_FILE = "features.json"
FOLDER = "features"
"""Default place, below the data set."""
ROW_INDEX_DTYPE = np.dtype(
    [("first", "<u8"), ("inputs", "<u4"), ("helpers", "<u4"), ("inputs_crc32", "<u4"), ("helpers_crc32", "<u4")]
)
BYTES_PER_NUMBER = 2
Rows = NDArray[np.uint16]


@dataclass(frozen=True)
class FeatureShard:
    """Features of one tar; `name` is the tar's without the ending."""

    name: str
    samples: int
    rows: int
    unusable: int
    """Samples without rows because they could not be read or decoded."""
    sha256: str
    index_sha256: str

    @property
    def rows_name(self) -> str:
        """File name of the rows."""
        return f"{self.name}.rows"

    @property
    def index_name(self) -> str:
        """File name of the index."""
        return f"{self.name}.rowidx"


@dataclass(frozen=True)
class FeatureManifest:
    """What `features.json` says."""

    made_of: dict[str, Any]
    """All that the features depend on, by name: data set, tower, image settings, the tower's precision."""
    width: int
    """Numbers of a row (D)."""
    created_with: dict[str, str]
    """Versions of the packages that wrote it."""
    shards: tuple[FeatureShard, ...]

    def to_json(self) -> bytes:
        """The content of `features.json`."""
        return json.dumps({"version": VERSION, **dataclasses.asdict(self)}, indent=1).encode() + b"\n"

    @staticmethod
    def from_json(data: bytes, where: str) -> FeatureManifest:
        """Parse and check `features.json`; raises UserError."""
        try:
            content = json.loads(data)
            if (version := content.pop("version")) != VERSION:
                raise UserError(f"{where}: version {version!r} is unknown to this release (it reads {VERSION})")
            content["shards"] = tuple(FeatureShard(**shard) for shard in content["shards"])
            manifest = FeatureManifest(**content)
            counts = [n for s in manifest.shards for n in (s.samples, s.rows, s.unusable)]
            if any(type(n) is not int or n < 0 for n in (*counts, manifest.width)) or not manifest.width:
                raise ValueError("a count that is no number")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{where}: not a valid description of stored features ({error})") from error
        return manifest


@dataclass(frozen=True, eq=False)
class FeatureSet:
    """Opened features of a data set. Can be pickled.

    `index` [samples] has ROW_INDEX_DTYPE; `shard_ends` [shards] is one past the last sample of each shard.
    """

    storage: Storage
    manifest: FeatureManifest
    index: NDArray[np.void]
    shard_ends: NDArray[np.int64]

    def read(self, sample_number: int, inputs: int, helpers: int) -> Rows:
        """Features [inputs + helpers, D] of a sample; `inputs` and `helpers` are the merged patches of its images.

        helpers: 0 also where helper images are not wanted. Raises UserError where the bytes cannot be read or are not
        those that were written, SampleError where another number of rows is stored.
        """
        entry = self.index[sample_number]
        shard = self.manifest.shards[int(np.searchsorted(self.shard_ends, sample_number, side="right"))]
        where = f"{self.storage.label}/{shard.rows_name}: sample {sample_number}"
        if int(entry["inputs"]) != inputs or (helpers and int(entry["helpers"]) != helpers):
            stored = f"{entry['inputs']} + {entry['helpers']}"
            raise SampleError(f"{where}: {stored} rows are stored, its images make {inputs} + {helpers}")
        width = self.manifest.width
        row_bytes = BYTES_PER_NUMBER * width
        offset, split = int(entry["first"]) * row_bytes, inputs * row_bytes
        data = self.storage.read_range(shard.rows_name, offset, (inputs + helpers) * row_bytes)
        view = memoryview(data)
        is_whole = zlib.crc32(view[:split]) == entry["inputs_crc32"]
        if not is_whole or (helpers and zlib.crc32(view[split:]) != entry["helpers_crc32"]):
            raise UserError(f"{where}: the bytes are not those that were written; copy or encode the data again")
        return np.frombuffer(data, "<u2").reshape(-1, width)

    def empty(self) -> Rows:
        """The features [0, D] of a sample without images."""
        return np.empty((0, self.manifest.width), np.uint16)

    @property
    def retries(self) -> int:
        """Reads that this process repeated after a transient fault."""
        return self.storage.retries


def open_features(location: str | Path, shards: ShardSet, made_of: dict[str, Any], key: str, mend: str) -> FeatureSet:
    """Open the features of `shards` at a path or http(s) address.

    Every index must be the one that was written, and every file of rows must have its size (over http only the first
    is asked for). made_of: what they must have been made of; without "tower" its weights do not matter.
    Raises UserError that begins with the recipe's `key`, says what differs, and ends with the command `mend`.
    """
    try:
        storage = open_storage(str(location))
        manifest = FeatureManifest.from_json(storage.read(FEATURES_FILE), f"{storage.label}/{FEATURES_FILE}")
        # rows are rounded to bf16 whatever the tower computed in: its precision need not be the run's
        ignored = {"precision"} | ({"tower"} - made_of.keys())
        stored = {name: value for name, value in manifest.made_of.items() if name not in ignored}
        if other := differences(stored, made_of):
            raise UserError(f"{storage.label}: made with {other}")
        _check_shards(manifest, shards.manifest.shards, storage.label)
        index = np.concatenate([_read_index(storage, shard) for shard in manifest.shards])
        for shard in manifest.shards if storage.sizes_are_cheap else manifest.shards[:1]:
            _check_size(storage, shard, manifest.width)
    except UserError as error:
        raise UserError(f"{key}: {error}; to have features for this recipe: {mend}") from error
    return FeatureSet(storage, manifest, index, np.cumsum([shard.samples for shard in manifest.shards]))


def differences(stored: dict[str, Any], wanted: dict[str, Any]) -> str:
    """Where `stored` is not as `wanted`, in words; "" where they are equal."""
    keys = [key for key in {**wanted, **stored} if stored.get(key) != wanted.get(key)]
    return ", ".join(f"{key} = {_short(stored.get(key))} (here {_short(wanted.get(key))})" for key in keys)


def _short(value: Any) -> str:
    return f"{value[:12]}..." if isinstance(value, str) and len(value) == 64 else str(value)


def _check_shards(manifest: FeatureManifest, tars: tuple[ShardInfo, ...], label: str) -> None:
    expected = [(tar.name.removesuffix(".tar"), tar.samples) for tar in tars]
    if [(shard.name, shard.samples) for shard in manifest.shards] != expected:
        raise UserError(f"{label}/{FEATURES_FILE}: its shards are not those of the data set")


def _read_index(storage: Storage, shard: FeatureShard) -> NDArray[np.void]:
    where = f"{storage.label}/{shard.index_name}"
    data = storage.read(shard.index_name)
    if hashlib.sha256(data).hexdigest() != shard.index_sha256:
        raise UserError(f"{where}: is not the index that was written with {shard.rows_name}")
    index: NDArray[np.void] = np.frombuffer(data, ROW_INDEX_DTYPE)
    ends = index["first"] + index["inputs"] + index["helpers"]
    follows = len(index) == shard.samples and index["first"][0] == 0 and bool((ends[:-1] == index["first"][1:]).all())
    if not follows or int(ends[-1]) != shard.rows:
        raise UserError(f"{where}: does not fit {shard.rows_name}")
    return index


def _check_size(storage: Storage, shard: FeatureShard, width: int) -> None:
    expected, size = BYTES_PER_NUMBER * width * shard.rows, storage.size(shard.rows_name)
    if size != expected:
        raise UserError(f"{storage.label}/{shard.rows_name}: has {size} bytes, {expected} were written")
