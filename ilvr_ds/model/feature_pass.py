"""`ilvr-ds encode`: one pass of the frozen tower over a packed data set, shard by shard, to files for training."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import transformers
from torch.utils.data import DataLoader, Dataset

import ilvr_ds
from ilvr_ds.config import ModelConfig
from ilvr_ds.data.feature_writer import FeatureWriter, SampleRows
from ilvr_ds.data.features import BYTES_PER_NUMBER, FOLDER
from ilvr_ds.data.images import Grid, ImageEncoder, VisionLayout, attention_bookkeeping
from ilvr_ds.data.reader import DamagedSampleError, ShardReader
from ilvr_ds.data.sample import SampleError
from ilvr_ds.data.shards import ShardInfo, ShardSet, open_dataset
from ilvr_ds.data.window import ImageBatch
from ilvr_ds.errors import UserError
from ilvr_ds.model.families import family_of
from ilvr_ds.model.student import DTYPES, load_config, vision_layout
from ilvr_ds.model.tower import load_tower, tower_identity
from ilvr_ds.model.vision import VisionTower

logger = logging.getLogger("ilvr_ds")
SHOWN = 20
"""At most this many unusable samples are logged."""
Progress = Callable[[int, int, int], None]
"""Called after every sample with the samples done, all of this part, and the bytes of rows written."""


@dataclass(frozen=True)
class EncodeSettings:
    """The options of `ilvr-ds encode`."""

    shards: str
    """Folder or http(s) address of the data set."""
    model: ModelConfig
    precision: str
    """What the tower computes in; rows are stored in bf16."""
    max_image_pixels: int
    blank_images: bool = False
    output: Path | None = None
    """None: the folder `features` of the data set."""
    part: tuple[int, int] = (0, 1)
    """(i, n): every n-th shard from shard i on."""
    workers: int = 2
    batch_patches: int = 16384
    """Most patches of samples that go through the tower together; a larger sample goes alone."""


def parse_part(text: str) -> tuple[int, int]:
    """(i, n) of "i/n"; raises UserError."""
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    part = (int(found[1]), int(found[2])) if found else (0, 0)
    if part[0] >= part[1]:
        raise UserError(f"--part {text}: expected I/N with I from 0 to N-1, for example 0/8 to 7/8")
    return part


def encode(settings: EncodeSettings, device: torch.device, progress: Progress | None = None) -> list[str]:
    """Store the features of a data set, or of a part of its shards; returns the lines of a report.

    Shards that are whole already are skipped. Samples that cannot be read or decoded get no rows and are logged;
    training replaces them. Raises UserError where data, model or folder do not fit.
    """
    dataset = open_dataset(settings.shards)
    images = ImageEncoder(settings.model.path, settings.max_image_pixels, settings.blank_images)
    config = load_config(settings.model.path)
    made_of = {"data": dataset.fingerprint, **tower_identity(settings.model, images)}
    versions = {"ilvr_ds": ilvr_ds.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    made_of["precision"] = settings.precision
    writer = FeatureWriter(_folder(settings), made_of, family_of(config).feature_width(config.vision_config), versions)
    mine = _Part(dataset, settings.part, writer)
    start = time.monotonic()
    if mine.missing:
        tower = load_tower(settings.model, images, DTYPES[settings.precision], device)
        pass_ = _Pass(tower, images, vision_layout(config), ShardReader(dataset), settings, device)
        _write(mine, pass_, writer, progress)
    return _report(mine, writer, time.monotonic() - start)


def _folder(settings: EncodeSettings) -> Path:
    if settings.output is None and re.match(r"https?:", settings.shards):
        raise UserError(f"{settings.shards}: nothing can be written there; give --output FOLDER")
    return (settings.output or Path(settings.shards) / FOLDER).absolute()


class _Part:
    """The shards of one part: (name, first sample, samples) of those that are not whole yet."""

    def __init__(self, dataset: ShardSet, part: tuple[int, int], writer: FeatureWriter) -> None:
        tars = dataset.manifest.shards
        self.names = [_stem(tar) for tar in tars]
        starts = np.cumsum([0, *(tar.samples for tar in tars)]).tolist()
        everything = list(zip(self.names, starts, (tar.samples for tar in tars), strict=False))
        self.mine = everything[part[0] :: part[1]]
        self.missing = [shard for shard in self.mine if writer.finished(shard[0]) is None]


def _stem(tar: ShardInfo) -> str:
    return tar.name.removesuffix(".tar")


def _write(part: _Part, pass_: _Pass, writer: FeatureWriter, progress: Progress | None) -> None:
    total = sum(samples for _, _, samples in part.missing)
    done = size = 0

    def counted(rows: Iterable[SampleRows | None]) -> Iterator[SampleRows | None]:
        nonlocal done, size
        for sample in rows:
            done += 1
            size += sum(part.nbytes for part in sample) if sample else 0
            if progress:
                progress(done, total, size)
            yield sample

    stream = pass_.samples([n for _, first, samples in part.missing for n in range(first, first + samples)])
    for name, _, samples in part.missing:
        # no batch spans two shards: a shard's bytes must not depend on where an earlier run ended
        writer.write(name, counted(pass_.rows(islice(stream, samples))))


def _report(part: _Part, writer: FeatureWriter, seconds: float) -> list[str]:
    samples = sum(count for _, _, count in part.missing)
    speed = f"{samples / seconds:.1f} a second" if samples else "nothing to do"
    lines = [f"{writer.folder}: {samples} samples encoded in {seconds:.0f} s ({speed})"]
    if (kept := len(part.mine) - len(part.missing)) > 0:
        lines.append(f"{kept} of {len(part.mine)} shards were whole already")
    shards = writer.finish(part.names)
    if shards is None:
        return [*lines, "shards of other parts are missing: the part that ends last makes the features usable"]
    rows, unusable = sum(shard.rows for shard in shards), sum(shard.unusable for shard in shards)
    row_bytes = BYTES_PER_NUMBER * writer.width
    lines.append(f"whole: {rows} rows of {row_bytes} bytes in {len(shards)} shards, {rows * row_bytes / 1e6:.1f} MB")
    if unusable:
        lines.append(f"samples without features, which training will replace: {unusable}")
    return [*lines, f"to train on them: data.features: {writer.folder} (held-out data: data.eval_features)"]


@dataclass(frozen=True)
class _SampleImages:
    """A sample's patches [patches, bytes] uint8, the grids of its images, and how many of them are input images."""

    patches: torch.Tensor
    grids: list[Grid]
    num_input_images: int


@dataclass
class _ImageDataset(Dataset[_SampleImages | UserError | SampleError]):
    """Item n: the images of sample n, or the error (raised in a worker, it would lose its type)."""

    reader: ShardReader
    images: ImageEncoder

    def __getitem__(self, number: int) -> _SampleImages | UserError | SampleError:
        try:
            sample = self.reader.read(number)
            encoded = self.images((*sample.input_images, *sample.helper_images))
        except (UserError, SampleError) as error:
            return error
        empty = np.empty((0, 0), np.uint8)
        patches = np.concatenate([patches for patches, _ in encoded]) if encoded else empty
        return _SampleImages(torch.from_numpy(patches), [grid for _, grid in encoded], len(sample.input_images))


class _Pass:
    """The tower and what feeds it."""

    def __init__(
        self,
        tower: VisionTower,
        images: ImageEncoder,
        layout: VisionLayout,
        reader: ShardReader,
        settings: EncodeSettings,
        device: torch.device,
    ) -> None:
        self.tower = tower
        self.layout = layout
        self.dataset = _ImageDataset(reader, images)
        self.settings = settings
        self.device = device
        self.unusable = 0

    def samples(self, numbers: list[int]) -> Iterator[_SampleImages | None]:
        """The images of these samples, in order; None for one that cannot be used."""
        loader: DataLoader[_SampleImages | UserError | SampleError] = DataLoader(
            self.dataset, batch_size=None, sampler=numbers, num_workers=self.settings.workers
        )
        for number, item in zip(numbers, loader, strict=True):
            if isinstance(item, _SampleImages):
                yield item
                continue
            if not isinstance(item, (SampleError, DamagedSampleError)):
                raise item  # a file or a server is away: nothing is wrong with the sample
            self.unusable += 1
            if self.unusable <= SHOWN:
                logger.warning("sample %d gets no features: %s", number, item)
            yield None

    def rows(self, samples: Iterable[_SampleImages | None]) -> Iterator[SampleRows | None]:
        """Features of each sample; several go through the tower together."""
        batch: list[_SampleImages | None] = []
        patches = 0
        for sample in samples:
            size = len(sample.patches) if sample else 0
            if batch and patches + size > self.settings.batch_patches:
                yield from self._encode(batch)
                batch, patches = [], 0
            batch.append(sample)
            patches += size
        yield from self._encode(batch)

    def _encode(self, batch: list[_SampleImages | None]) -> Iterator[SampleRows | None]:
        merge_unit = self.layout.merge_size**2
        filled = [sample for sample in batch if sample and sample.grids]
        features = self._features(filled)
        first = 0
        for sample in batch:
            if sample is None:
                yield None
                continue
            merged = [height * width // merge_unit for height, width in sample.grids]
            split, last = first + sum(merged[: sample.num_input_images]), first + sum(merged)
            yield features[first:split], features[split:last]
            first = last

    def _features(self, samples: list[_SampleImages]) -> np.ndarray:
        """[rows, D] bf16 as uint16: all images of `samples`, by one call of the tower."""
        if not samples:
            return np.empty((0, 0), np.uint16)
        grids = [grid for sample in samples for grid in sample.grids]
        patches = torch.cat([sample.patches for sample in samples])
        images = ImageBatch(patches, **attention_bookkeeping(grids, self.layout)).to(self.device)
        features = self.tower(images).to(torch.bfloat16).cpu()
        if not bool(features.isfinite().all()):
            raise UserError(
                f"--precision {self.settings.precision}: the tower's features are not finite; take another precision, "
                "or other weights"
            )
        rows: np.ndarray = features.view(torch.int16).numpy().view(np.uint16)
        return rows
