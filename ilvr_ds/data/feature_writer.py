"""Writes stored features (see features.py) shard by shard, and skips shards that are whole."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from ilvr_ds.data.features import (
    BYTES_PER_NUMBER,
    FEATURES_FILE,
    ROW_INDEX_DTYPE,
    FeatureManifest,
    FeatureShard,
    Rows,
    differences,
)
from ilvr_ds.errors import UserError
from ilvr_ds.whole_files import partial_name, whole_file

logger = logging.getLogger("ilvr_ds")
SampleRows = tuple[Rows, Rows]
"""Features [rows, D] of a sample's input images and of its helper images."""


class FeatureWriter:
    """Writes the features of a data set into `folder`.

    Several processes may write shards of one data set; the one that finds all whole writes `features.json`. Files get
    their names when they are whole; of two processes with the same shard, the first to finish wins. `made_of`: all that
    the features depend on.
    """

    def __init__(self, folder: Path, made_of: dict[str, Any], width: int, created_with: dict[str, str]) -> None:
        self.folder = folder
        self.made_of = made_of
        self.width = width
        self.created_with = created_with
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder}: cannot be created ({error.strerror})") from error

    def finished(self, name: str) -> FeatureShard | None:
        """The shard's entry where it is whole; raises UserError where it was made of something else."""
        entry = self.folder / f"{name}.json"
        if not entry.exists():
            return None
        try:
            content = json.loads(entry.read_bytes())
            made_of, shard = content["made_of"], FeatureShard(**content["shard"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{entry}: cannot be read ({error}); remove it to have the shard encoded again") from error
        if other := differences(made_of, self.made_of):
            raise UserError(f"{self.folder}: holds features made with {other}; give another --output, or remove it")
        rows = self.folder / shard.rows_name
        is_whole = rows.exists() and rows.stat().st_size == BYTES_PER_NUMBER * self.width * shard.rows
        return shard if is_whole and (self.folder / shard.index_name).exists() else None

    def write(self, name: str, samples: Iterable[SampleRows | None]) -> FeatureShard:
        """Write one shard, sample by sample; None stands for a sample that cannot be used."""
        partial = partial_name(self.folder / f"{name}.rows")
        try:
            shard, index = self._write(partial, name, samples)
            return self._publish(partial, shard, index)
        except OSError as error:
            raise UserError(f"{self.folder}: cannot write {name} ({error.strerror}); then run this again") from error
        finally:
            partial.unlink(missing_ok=True)

    def _write(self, partial: Path, name: str, samples: Iterable[SampleRows | None]) -> tuple[FeatureShard, bytes]:
        digest = hashlib.sha256()
        entries: list[tuple[int, int, int, int, int]] = []
        first = unusable = 0
        with partial.open("wb") as file:
            for sample in samples:
                unusable += sample is None
                parts = [np.ascontiguousarray(rows, "<u2").tobytes() for rows in sample] if sample else [b"", b""]
                counts = [len(part) // (BYTES_PER_NUMBER * self.width) for part in parts]
                entries.append((first, *counts, *map(zlib.crc32, parts)))  # type: ignore[arg-type]
                first += sum(counts)
                for part in parts:
                    digest.update(part)
                    file.write(part)
            file.flush()
            os.fsync(file.fileno())
        index = np.array(entries, ROW_INDEX_DTYPE).tobytes()
        shard = FeatureShard(name, len(entries), first, unusable, digest.hexdigest(), hashlib.sha256(index).hexdigest())
        return shard, index

    def _publish(self, partial: Path, shard: FeatureShard, index: bytes) -> FeatureShard:
        """Name the files, one process at a time: rows must not end up beside another process's checksums."""
        with _alone(self.folder):
            if (whole := self.finished(shard.name)) is not None:
                logger.warning("%s was encoded by another process meanwhile: its features stay", shard.name)
                return whole
            partial.replace(self.folder / shard.rows_name)
            _write_whole(self.folder / shard.index_name, index)
            content = {"made_of": self.made_of, "shard": dataclasses.asdict(shard)}
            _write_whole(self.folder / f"{shard.name}.json", json.dumps(content, indent=1).encode() + b"\n")
            for stale in self.folder.glob(f"{shard.name}.*.partial-*"):  # of a killed process, or a slower one
                stale.unlink(missing_ok=True)
        return shard

    def finish(self, names: Sequence[str]) -> tuple[FeatureShard, ...] | None:
        """Write `features.json` where all shards `names` are whole, and return them; None where some are missing."""
        shards = [self.finished(name) for name in names]
        whole = tuple(shard for shard in shards if shard is not None)
        if len(whole) < len(names):
            return None
        manifest = FeatureManifest(self.made_of, self.width, self.created_with, whole)
        _write_whole(self.folder / FEATURES_FILE, manifest.to_json())
        return whole


def _write_whole(path: Path, data: bytes) -> None:
    """Write a small file, on the disk when this returns; several processes may do so at once."""
    with whole_file(path) as partial, partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time, while files are renamed; network file systems without locks go without."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
