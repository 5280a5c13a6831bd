"""A packed data set on disk: webdataset tars, a byte-range index for each, and `dataset.json`.

    dataset.json          what the data set holds, with sizes and sha256 of all other files
    shard-000000.tar      an ordinary webdataset tar (see members.py)
    shard-000000.idx      20 bytes a sample: offset uint64, length, tokens and crc32 uint32 (little endian)
    rejected.jsonl        records that were left out, and why

Samples are numbered through the whole data set in packed order, from 0.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import mmap
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ilvr_ds.data.members import END_OF_ARCHIVE, MemberError, key_of, walk_members
from ilvr_ds.data.storage import LocalFolder, Storage, open_storage
from ilvr_ds.errors import UserError

VERSION = 2
DATASET_FILE = "dataset.json"
INDEX_DTYPE = np.dtype([("offset", "<u8"), ("length", "<u4"), ("tokens", "<u4"), ("crc32", "<u4")])
_SHARD_NAME = re.compile(r"shard-\d{6,}\.tar")
_HASH_STEP = 16 * 1024 * 1024


@dataclass(frozen=True)
class ShardInfo:
    """One tar: its file name, number of samples, size in bytes, and the sha256 of itself and of its index."""

    name: str
    samples: int
    size_bytes: int
    sha256: str
    index_sha256: str

    @property
    def index_name(self) -> str:
        """File name of the index."""
        return self.name.removesuffix(".tar") + ".idx"


@dataclass(frozen=True)
class Manifest:
    """What `dataset.json` says."""

    name: str
    samples: int
    size_bytes: int
    """Length of all tars together."""
    groups: dict[str, int]
    """Samples of each group, by name."""
    samples_without_plan: int
    """Samples to evaluate on, without supervision; training refuses them."""
    longest_tokens: int
    """Length of the longest sample in tokens; 0 where lengths were not measured."""
    tokens_measured_with: dict[str, Any] | None
    """Tokenizer, latent size and other settings that the lengths were measured with."""
    rejected: int
    source: dict[str, str] | None
    """Name and sha256 of the file that was packed."""
    created_with: dict[str, str]
    """Versions of the packages that wrote it."""
    shards: tuple[ShardInfo, ...]
    samples_without_region: int | None = None
    """Samples with a latent step that has no region; None where no step of the data set has one."""

    def to_json(self) -> bytes:
        """The content of `dataset.json`."""
        content = {"version": VERSION, **dataclasses.asdict(self)}
        if self.samples_without_region is None:
            del content["samples_without_region"]
        return json.dumps(content, indent=1, ensure_ascii=True).encode() + b"\n"

    @staticmethod
    def from_json(data: bytes, where: str) -> Manifest:
        """Parse and check `dataset.json`; raises UserError."""
        try:
            content = json.loads(data)
            version = content.pop("version")
            if version != VERSION:
                raise UserError(
                    f"{where}: version {version!r} is unknown to this release (it reads {VERSION}); pack the data again"
                )
            content["shards"] = tuple(ShardInfo(**shard) for shard in content["shards"])
            manifest = Manifest(**content)
            _check(manifest)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{where}: not a valid data set description ({error}); pack the data again") from error
        if manifest.samples == 0:
            raise UserError(f"{where}: the data set has 0 samples")
        return manifest


@dataclass(frozen=True, eq=False)
class ShardSet:
    """An opened data set: what its files say, and the storage of its samples. Can be pickled.

    `index` [samples] holds offset, length, tokens and checksum of each sample; `fingerprint` is the sha256 of
    `dataset.json`.
    """

    storage: Storage
    manifest: Manifest
    index: NDArray[np.void]
    fingerprint: str

    def __len__(self) -> int:
        return self.manifest.samples

    @property
    def location(self) -> str:
        """Where the data set lies, for messages."""
        return self.storage.label

    @property
    def shard_sizes(self) -> tuple[int, ...]:
        """Samples of each shard."""
        return tuple(shard.samples for shard in self.manifest.shards)

    @property
    def tokens(self) -> NDArray[np.uint32]:
        """[samples]: length of each sample in tokens; 0 where it was not measured."""
        return self.index["tokens"]

    def check_trainable(self) -> None:
        """Raise UserError where samples have no plan to learn from."""
        if missing := self.manifest.samples_without_plan:
            raise UserError(
                f"{self.location}: {missing} of {len(self)} samples have no plan; they can only be evaluated on"
            )

    def check_regions(self) -> None:
        """Raise UserError where latent steps have no region, which `selection.pool: region` needs."""
        missing = self.manifest.samples_without_region
        if missing != 0:
            who = "no sample has a region" if missing is None else f"{missing} of {len(self)} samples have none"
            raise UserError(
                f"selection.pool is region, which every latent step needs, but in {self.location} {who}; pack records "
                "that have them (docs/formats.md), or set selection.pool to changed or all"
            )


def open_dataset(location: str | Path, verify: Literal["quick", "full"] = "quick") -> ShardSet:
    """Open a packed data set at a path or http(s) address.

    quick: every index must be the packed one, and every tar must have its size (over http only the first is checked).
    full: every tar must have its size and its sha256. Raises UserError with the file's name.
    """
    storage = open_storage(str(location))
    try:
        text = storage.read(DATASET_FILE)
    except UserError as error:
        raise UserError(f"{error}; expected a folder that `ilvr-ds pack` wrote") from error
    manifest = Manifest.from_json(text, f"{storage.label}/{DATASET_FILE}")
    index = np.concatenate([_read_index(storage, shard) for shard in manifest.shards])
    for shard in manifest.shards if storage.sizes_are_cheap or verify == "full" else manifest.shards[:1]:
        _check_tar(storage, shard, verify)
    return ShardSet(storage, manifest, index, hashlib.sha256(text).hexdigest())


def build_index(tar: Path, first: int, tokens: Sequence[int]) -> NDArray[np.void]:
    """The index [len(tokens)] of a finished tar whose samples are numbered from `first` on.

    Raises MemberError unless the tar is whole: its keys are exactly these numbers in order, the members of a key lie
    together, all are allowed, names are unique, and the end-of-archive marker follows the last.
    """
    if tar.stat().st_size == 0:
        raise MemberError("the file is empty")
    with tar.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        members = walk_members(data)
        end = members[-1].end if members else 0
        rest = data[end:]
        starts = [m.start for i, m in enumerate(members) if i == 0 or m.key != members[i - 1].key]
        sums = [zlib.crc32(data[start:stop]) for start, stop in pairwise([*starts, end])]
    if len(rest) < len(END_OF_ARCHIVE) or any(rest):
        raise MemberError("the end-of-archive marker is missing")
    keys = [m.key for i, m in enumerate(members) if i == 0 or m.key != members[i - 1].key]
    if len({m.name for m in members}) < len(members):
        raise MemberError("two members have one name")
    if keys != [key_of(first + i) for i in range(len(tokens))]:
        raise MemberError(f"expected {len(tokens)} samples from {key_of(first)} on, found {len(keys)} or another order")
    index = np.empty(len(tokens), INDEX_DTYPE)
    index["offset"] = starts
    index["length"] = np.diff([*starts, end])
    index["tokens"] = tokens
    index["crc32"] = sums
    return index


def describe_shard(tar: Path, index: NDArray[np.void]) -> ShardInfo:
    """Write the index of a finished tar beside it; returns the tar's entry in `dataset.json`."""
    index_sha256 = hashlib.sha256(index.tobytes()).hexdigest()
    info = ShardInfo(tar.name, len(index), tar.stat().st_size, file_sha256(tar), index_sha256)
    tar.with_name(info.index_name).write_bytes(index.tobytes())
    return info


def file_sha256(path: Path) -> str:
    """The sha256 of a file, in hexadecimal digits."""
    return _sha256(LocalFolder(path.parent), path.name, path.stat().st_size)


def _check(manifest: Manifest) -> None:
    """Raise ValueError where numbers contradict each other or a name is not a plain shard name."""
    names = [shard.name for shard in manifest.shards]
    if not all(isinstance(name, str) and _SHARD_NAME.fullmatch(name) for name in names) or len(set(names)) < len(names):
        raise ValueError(f"shards {names[:3]} ... are not named shard-000000.tar and so on")
    if any(type(n) is not int or n <= 0 for shard in manifest.shards for n in (shard.samples, shard.size_bytes)):
        raise ValueError("a shard without samples or bytes")
    counts = (
        manifest.samples_without_plan, manifest.longest_tokens, manifest.rejected, manifest.samples_without_region or 0,
        *manifest.groups.values(),
    )  # fmt: skip
    if any(type(n) is not int or n < 0 for n in counts):
        raise ValueError("a count that is no number")
    for total, parts in (
        (manifest.samples, [shard.samples for shard in manifest.shards]),
        (manifest.size_bytes, [shard.size_bytes for shard in manifest.shards]),
        (manifest.samples, list(manifest.groups.values())),
    ):
        if total != sum(parts):
            raise ValueError(f"a total of {total} is not the sum of its parts, {sum(parts)}")


def _read_index(storage: Storage, shard: ShardInfo) -> NDArray[np.void]:
    where = f"{storage.label}/{shard.index_name}"
    data = storage.read(shard.index_name)
    if hashlib.sha256(data).hexdigest() != shard.index_sha256:
        raise UserError(f"{where}: is not the index that was packed with {shard.name}; copy or pack the data again")
    index: NDArray[np.void] = np.frombuffer(data, INDEX_DTYPE)
    ends = index["offset"] + index["length"]
    follows = len(index) == shard.samples and index["offset"][0] == 0 and bool((ends[:-1] == index["offset"][1:]).all())
    if not follows or ends[-1] + len(END_OF_ARCHIVE) > shard.size_bytes:
        raise UserError(f"{where}: does not fit {shard.name}; pack the data again")
    return index


def _check_tar(storage: Storage, shard: ShardInfo, verify: str) -> None:
    where = f"{storage.label}/{shard.name}"
    size = storage.size(shard.name)
    if size != shard.size_bytes:
        raise UserError(f"{where}: has {size} bytes, {shard.size_bytes} were packed; copy or pack the data again")
    if verify == "full" and _sha256(storage, shard.name, shard.size_bytes) != shard.sha256:
        raise UserError(f"{where}: its bytes are not those that were packed; copy or pack the data again")


def _sha256(storage: Storage, name: str, size: int) -> str:
    digest = hashlib.sha256()
    for offset in range(0, size, _HASH_STEP):
        digest.update(storage.read_range(name, offset, min(_HASH_STEP, size - offset)))
    return digest.hexdigest()
