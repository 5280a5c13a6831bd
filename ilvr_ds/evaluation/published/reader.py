"""The samples of a published benchmark, from a folder in the layout of its data set or by the data set's name."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from huggingface_hub import snapshot_download

from ilvr_ds import dist
from ilvr_ds.data.check import check_sample
from ilvr_ds.data.sample import Sample, SampleError
from ilvr_ds.errors import UserError
from ilvr_ds.evaluation.published.benchmark import Published
from ilvr_ds.evaluation.published.rows import read_rows

_PICTURE_FILES = ("*.jpg", "*.jpeg", "*.png", "*.webp")


class PublishedReader:
    """Random access to the samples; pictures are read when asked for."""

    def __init__(self, benchmark: Published, folder: Path, location: str) -> None:
        self.benchmark = benchmark
        self.folder = folder
        self.location = location
        self.rows = read_rows(_files(benchmark, folder, location), benchmark.pictures)
        if not self.rows:
            raise UserError(f"--data: '{location}' has no records")

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, number: int) -> Sample:
        """The sample with this number, from 0; raises UserError where the copy is not as it was published."""
        row = self.rows[number]
        try:
            sample = self.benchmark.sample(row)
            check_sample(sample)
        except (SampleError, ValueError) as error:
            raise UserError(f"{row}: {error}; copy {self.benchmark.hub} again") from error
        return sample

    @property
    def fingerprint(self) -> str:
        """Of all words, and of the files that they stand in."""
        files = sorted({row.file for row in self.rows})
        sizes = [[file.relative_to(self.folder).as_posix(), file.stat().st_size] for file in files]
        words = json.dumps([sizes, [row.values for row in self.rows]], sort_keys=True, default=str)
        return hashlib.sha256(words.encode()).hexdigest()


def open_published(benchmark: Published, data: str | None) -> PublishedReader:
    """Open the copy at `data`: a folder, or a name on the hub, None for the usual one (collective).

    The first rank of each host downloads, the others find it there. Raises UserError.
    """
    name = data or benchmark.hub
    if Path(name).is_dir():
        return PublishedReader(benchmark, Path(name), name)
    commit = dist.decided_by_main(lambda: Path(_download(benchmark, name)).name)
    folder = dist.first_on_host(lambda is_first: _download(benchmark, name, commit, is_here=not is_first))
    return PublishedReader(benchmark, Path(folder), name)


def _download(benchmark: Published, name: str, commit: str | None = None, *, is_here: bool = False) -> str:
    patterns = [layout.removeprefix("**/") for layout in benchmark.layouts]
    wanted = [f"*{pattern}" for pattern in patterns] + list(_PICTURE_FILES)
    try:
        return snapshot_download(
            name, repo_type="dataset", revision=commit, allow_patterns=wanted, local_files_only=is_here
        )
    except (OSError, ValueError) as error:
        what = str(error).strip().splitlines()[0]
        raise UserError(f"--data: no folder and no data set of the hub at '{name}' ({what})") from error


def _files(benchmark: Published, folder: Path, location: str) -> list[Path]:
    for layout in benchmark.layouts:
        if files := sorted(folder.glob(layout)):
            return files
    expected = " nor ".join(benchmark.layouts)
    raise UserError(
        f"--data: '{location}' has no {expected}, as {benchmark.hub} has; give a copy of that data set, or leave "
        "--data out to load it from the hub"
    )
