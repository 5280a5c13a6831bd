"""Writes a packed data set, all of it or nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import webdataset

import ilvr_ds
from ilvr_ds.data.members import encode_members, key_of
from ilvr_ds.data.sample import LatentStep, Sample
from ilvr_ds.data.shards import DATASET_FILE, Manifest, ShardInfo, build_index, describe_shard
from ilvr_ds.errors import UserError
from ilvr_ds.unfinished import finish, unfinished_folder

_OURS = re.compile(r"dataset\.json|rejected\.jsonl|shard-\d{6,}\.(tar|idx)")
"""Files of a packed data set."""
MAX_SAMPLES_PER_SHARD = 1000
MAX_SHARD_BYTES = 1024 * 1024 * 1024


@dataclasses.dataclass(frozen=True)
class Provenance:
    """Where a data set comes from; the fields are those of shards.Manifest."""

    rejected: int = 0
    source: dict[str, str] | None = None
    tokens_measured_with: dict[str, Any] | None = None


class DatasetWriter:
    """Writes samples into a folder beside `output`, `folder`, which `finish` renames.

    A context manager: leaving it without `finish` removes that folder, and what a killed process left is removed by the
    next (unfinished.py). A shard is closed when it holds `max_samples_per_shard` samples or has passed
    `max_shard_bytes`. The bytes written depend on the samples alone. Raises UserError where `output` is in the way;
    `overwrite` replaces an earlier data set, and nothing but that.
    """

    def __init__(
        self,
        output: Path,
        *,
        max_samples_per_shard: int = MAX_SAMPLES_PER_SHARD,
        max_shard_bytes: int = MAX_SHARD_BYTES,
        overwrite: bool = False,
    ) -> None:
        self.output = output.resolve()
        self.overwrite = overwrite
        _check_output(self.output, overwrite)
        self._open = contextlib.ExitStack()
        self.samples = 0
        self.groups: Counter[str] = Counter()
        self.samples_without_plan = 0
        self.samples_without_region = 0
        self.regions = 0
        self.bytes = 0
        self.longest_tokens = 0
        self._tokens: list[int] = []  # of the samples of the open shard
        self._shards: list[ShardInfo] = []
        self._limits = {"maxcount": max_samples_per_shard, "maxsize": max_shard_bytes}
        self._aborted = False

    def __enter__(self) -> DatasetWriter:
        try:
            self.folder = self._open.enter_context(unfinished_folder(self.output))
        except OSError as error:
            raise UserError(f"{self.output}: cannot be created ({error.strerror})") from error
        # webdataset's own opener would run names like "pipe:..." as commands.
        self._tars = webdataset.ShardWriter(
            "shard-%06d.tar",
            opener=self._open_tar,
            post=self._close_tar,
            encoder=False,
            mtime=0,
            verbose=0,
            **self._limits,
        )
        return self

    def write(self, sample: Sample, tokens: int = 0) -> None:
        """Add a sample of `tokens` tokens (0: not measured); one that raises SampleError is left out."""
        members = encode_members(sample)
        with self._named_errors():
            self._tars.write({"__key__": key_of(self.samples), **members})
        self._tokens.append(tokens)
        self.samples += 1
        self.bytes += sum(map(len, members.values()))
        self.groups[sample.group] += 1
        self.samples_without_plan += not sample.steps
        regions = [step.region for step in sample.steps if isinstance(step, LatentStep)]
        self.regions += sum(region is not None for region in regions)
        self.samples_without_region += None in regions
        self.longest_tokens = max(self.longest_tokens, tokens)

    def finish(self, provenance: Provenance, texts: Mapping[str, str] | None = None) -> Manifest:
        """Close the last shard, write `dataset.json` and further files of `texts`, and move the whole to `output`."""
        if self.samples == 0:
            raise UserError(f"{self.output}: there are no samples to write")
        with self._named_errors():
            return self._finish(provenance, texts or {})

    def _finish(self, provenance: Provenance, texts: Mapping[str, str]) -> Manifest:
        self._tars.close()
        for name, text in texts.items():
            (self.folder / name).write_text(text)
        manifest = Manifest(
            name=self.output.name,
            samples=self.samples,
            size_bytes=sum(shard.size_bytes for shard in self._shards),
            groups=dict(sorted(self.groups.items())),
            samples_without_plan=self.samples_without_plan,
            longest_tokens=self.longest_tokens,
            created_with={"ilvr_ds": ilvr_ds.__version__, "webdataset": webdataset.__version__},
            shards=tuple(self._shards),
            samples_without_region=self.samples_without_region if self.regions else None,
            **dataclasses.asdict(provenance),
        )
        (self.folder / DATASET_FILE).write_bytes(manifest.to_json())
        self._move_into_place()
        return manifest

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._open:  # removes the folder where it still stands
            if self.folder.exists():
                self._aborted = True
                with contextlib.suppress(OSError, AttributeError):  # a full disk, or closed already
                    self._tars.close()

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        """UserError for what the disk refuses."""
        try:
            yield
        except OSError as error:
            raise UserError(f"{self.output}: cannot be written ({error.strerror})") from error

    def _open_tar(self, name: str) -> BinaryIO:
        self._file = (self.folder / name).open("wb")
        return self._file

    def _close_tar(self, name: str) -> None:
        self._file.close()
        if self._tokens and not self._aborted:
            tar = self.folder / name
            index = build_index(tar, self.samples - len(self._tokens), self._tokens)
            self._shards.append(describe_shard(tar, index))
            self._tokens = []

    def _move_into_place(self) -> None:
        _check_output(self.output, self.overwrite)  # another process may have come first
        previous = None
        if self.output.exists() and any(self.output.iterdir()):
            previous = self.output.rename(self.folder.with_name(f"{self.folder.name}-replaced"))
        finish(self.folder, self.output)
        if previous:
            shutil.rmtree(previous)


def _check_output(output: Path, overwrite: bool) -> None:
    if not output.exists():
        return
    if not output.is_dir():
        raise UserError(f"{output}: is a file; give a folder")
    if output.is_mount():  # the finished folder is renamed to its name
        raise UserError(f"{output}: is a mount point; give a folder below it")
    if any(output.iterdir()):
        if not overwrite:
            raise UserError(f"{output}: is not empty; give another folder, or overwrite it by --overwrite")
        if not (output / DATASET_FILE).exists():
            raise UserError(f"{output}: holds something other than a packed data set and is not overwritten")
        if others := sorted(path.name for path in output.iterdir() if not _OURS.fullmatch(path.name)):
            raise UserError(f"{output / others[0]}: is no part of the data set there; move it away, or delete it")
