"""Packs records or samples into a data set, counting whatever is left out."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ilvr_ds.data.decode import Treatment, treatments
from ilvr_ds.data.sample import LatentStep, Sample, SampleError
from ilvr_ds.data.shards import Manifest, file_sha256
from ilvr_ds.data.writer import MAX_SAMPLES_PER_SHARD, DatasetWriter, Provenance
from ilvr_ds.errors import UserError, in_one_line
from ilvr_ds.ingest.containers.opening import open_source
from ilvr_ds.ingest.containers.source import Unit
from ilvr_ds.ingest.image_files import Helper
from ilvr_ds.ingest.importers import Format, Importer, Rejected, Tell, check_request

REJECTED_FILE = "rejected.jsonl"
_PRINTED_REJECTIONS = 20
_PRINTED_KEYS = 10

Measure = Callable[[Sample], int]
"""Length of a sample in tokens; raises SampleError for a sample that cannot be encoded."""
Progress = Callable[[int, int, int], None]
"""Called after every record with the records done, those rejected so far, and the bytes written."""


class _TooLongError(SampleError):
    """A sample of more tokens than allowed."""


@dataclass
class Contents:
    """What the written samples hold, so that people see whether it is what they meant."""

    lacking: Counter[str] = field(default_factory=Counter)
    """Samples without an input image, an answer or, where they have a plan, a latent step."""
    pictures: Counter[str] = field(default_factory=Counter)
    """Pictures that are not shown as their pixels are stored, by what is done to them."""
    other_keys: Counter[str] = field(default_factory=Counter)
    """Samples by key of `meta`."""

    def add(self, sample: Sample, treated: list[Treatment]) -> None:
        """Count one sample; `treated` is what is done to its images."""
        self.pictures.update(treated)
        has_latents = any(isinstance(step, LatentStep) for step in sample.steps)
        self.lacking["an input image"] += not sample.input_images
        self.lacking["an answer"] += not sample.answer.strip()
        self.lacking["a latent step"] += bool(sample.steps) and not has_latents
        self.other_keys.update(list(sample.meta))

    def lines(self) -> list[str]:
        """The report, one line for each finding."""
        lines = [f"without {part}: {count}" for part, count in self.lacking.items() if count]
        lines += [f"pictures {treatment}: {count}" for treatment, count in sorted(self.pictures.items())]
        keys = [f"{key} ({count})" for key, count in self.other_keys.most_common(_PRINTED_KEYS)]
        more = f", and {len(self.other_keys) - len(keys)} more" if len(self.other_keys) > len(keys) else ""
        return lines + ([f"other keys, kept as they are: {', '.join(keys)}{more}"] if keys else [])


@dataclass(frozen=True)
class PackReport:
    """What was packed and what was not; `rejected` includes the `too_long` ones."""

    output: Path
    manifest: Manifest
    rejected: tuple[Rejected, ...]
    too_long: int
    contents: Contents
    unit: Unit = "record"
    """What the numbers of rejected records count."""

    @property
    def accepted(self) -> int:
        """Samples written."""
        return self.manifest.samples

    @property
    def without_plan(self) -> int:
        """Samples written that can be evaluated on, but not trained on."""
        return self.manifest.samples_without_plan

    @property
    def bytes(self) -> int:
        """Length of all tars together."""
        return self.manifest.size_bytes

    @property
    def groups(self) -> dict[str, int]:
        """Samples written, by group."""
        return self.manifest.groups

    def lines(self) -> list[str]:
        """The report for people: totals, groups, and the first rejected records with line and reason."""
        shards = f"{len(self.manifest.shards)} shard{'s' * (len(self.manifest.shards) != 1)}"
        lines = [f"{self.output}: {self.accepted} samples in {shards}, {self.bytes / 1e6:.1f} MB"]
        if self.manifest.longest_tokens:
            lines.append(f"longest sample: {self.manifest.longest_tokens} tokens")
        if self.without_plan:
            lines.append(f"without a plan, for evaluation only: {self.without_plan}")
        lines += self.contents.lines()
        lines += [f"group {name or '(none)'}: {count}" for name, count in self.groups.items()]
        if self.rejected:
            lines.append(f"rejected: {len(self.rejected)}, of which too long: {self.too_long}")
        lines += [f"  {self.unit} {r.line} ({r.id}): {r.reason}" for r in self.rejected[:_PRINTED_REJECTIONS]]
        if len(self.rejected) > _PRINTED_REJECTIONS:
            lines.append(f"  ... and {len(self.rejected) - _PRINTED_REJECTIONS} more in {self.output / REJECTED_FILE}")
        return [in_one_line(line) for line in lines]


@dataclass
class _Tally:
    """Counts while packing."""

    unit: Unit
    done: int = 0
    rejected: list[Rejected] = field(default_factory=list)
    too_long: int = 0
    first_lines: dict[str, int] = field(default_factory=dict)
    contents: Contents = field(default_factory=Contents)


def pack(
    input: Path | str,
    image_root: Path,
    output: Path,
    *,
    format: Format = "auto",
    helper: Helper = "crop",
    subset: str | None = None,
    split: str | None = None,
    measure: Measure | None = None,
    measured_with: dict[str, Any] | None = None,
    max_tokens: int | None = None,
    max_samples_per_shard: int = MAX_SAMPLES_PER_SHARD,
    overwrite: bool = False,
    progress: Progress | None = None,
    tell: Tell | None = None,
) -> PackReport:
    """Pack the records of a file, a folder or `hf:OWNER/NAME` (opening.py, importers.py) into the folder `output`.

    `measure` gives a sample's length in tokens; `measured_with`, what it depends on, is recorded. Samples of more than
    `max_tokens` are rejected, never truncated. Rejected records go to `rejected.jsonl` with number and reason. A
    failure leaves nothing at `output`. Raises UserError, also where no record was accepted.
    """
    check_request(image_root, format)
    source = open_source(input, subset, split)
    importer = Importer(source, image_root, format, helper, tell)
    writer = DatasetWriter(output, max_samples_per_shard=max_samples_per_shard, overwrite=overwrite)
    origin = {**source.origin, **_checksum(Path(input))}
    return _pack(importer, writer, (source.unit, origin), measure, measured_with, max_tokens, progress)


def pack_samples(
    samples: Iterable[Sample],
    output: Path,
    *,
    measure: Measure | None = None,
    measured_with: dict[str, Any] | None = None,
    max_tokens: int | None = None,
    max_samples_per_shard: int = MAX_SAMPLES_PER_SHARD,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> PackReport:
    """Like pack, for samples made by a program; their running number (from 1) stands for the line."""
    writer = DatasetWriter(output, max_samples_per_shard=max_samples_per_shard, overwrite=overwrite)
    return _pack(enumerate(samples, start=1), writer, ("line", None), measure, measured_with, max_tokens, progress)


def _pack(
    records: Iterable[tuple[int, Sample | Rejected]],
    writer: DatasetWriter,
    source: tuple[Unit, dict[str, str] | None],
    measure: Measure | None,
    measured_with: dict[str, Any] | None,
    max_tokens: int | None,
    progress: Progress | None,
) -> PackReport:
    if max_tokens is not None and measure is None:
        raise ValueError("max_tokens needs measure")
    unit, origin = source
    tally = _Tally(unit)
    with writer:
        for line, record in records:
            rejected = (
                record if isinstance(record, Rejected) else _add(line, record, writer, tally, measure, max_tokens)
            )
            tally.done += 1
            tally.rejected += [rejected] if rejected else []
            if progress:
                progress(tally.done, len(tally.rejected), writer.bytes)
        if writer.samples == 0:
            raise UserError(f"{writer.output}: nothing to pack: {_why_nothing(tally)}")
        lines = [json.dumps(asdict(rejected)) + "\n" for rejected in tally.rejected]
        manifest = writer.finish(
            Provenance(len(tally.rejected), origin, measured_with), {REJECTED_FILE: "".join(lines)}
        )
    return PackReport(writer.output, manifest, tuple(tally.rejected), tally.too_long, tally.contents, unit)


def _add(
    line: int, sample: Sample, writer: DatasetWriter, tally: _Tally, measure: Measure | None, max_tokens: int | None
) -> Rejected | None:
    """Write one sample, or return why not."""
    try:
        if sample.id in tally.first_lines:
            raise SampleError(f"the id already stands in {tally.unit} {tally.first_lines[sample.id]}")
        tokens = measure(sample) if measure else 0
        if max_tokens is not None and tokens > max_tokens:
            raise _TooLongError(f"{tokens} tokens, the limit is {max_tokens}")
        treated = [what for data in (*sample.input_images, *sample.helper_images) for what in treatments(data)]
        writer.write(sample, tokens)
        tally.contents.add(sample, treated)
        tally.first_lines[sample.id] = line
    except SampleError as error:
        tally.too_long += isinstance(error, _TooLongError)
        return Rejected(line, sample.id, str(error))
    return None


def _why_nothing(tally: _Tally) -> str:
    if not tally.rejected:
        return "there are no records"
    first, kinds = tally.rejected[0], Counter(_kind_of(rejected.reason) for rejected in tally.rejected)
    others = len(tally.rejected) - kinds[_kind_of(first.reason)]
    more = f"; {others} of them for {'other reasons' if others > 1 else 'another reason'}" if others else ""
    who = "the only record was" if tally.done == 1 else f"all {tally.done} records were"
    return f"{who} rejected, {tally.unit} {first.line}: {first.reason}{more}"


def _kind_of(reason: str) -> str:
    """A reason without the names, paths and numbers that differ between records."""
    return re.sub(r"'[^']*'|\S*/\S*|\d+", "", reason)


def _checksum(path: Path) -> dict[str, str]:
    """The sha256 of a file; nothing for folders and hub names."""
    try:
        return {"sha256": file_sha256(path)} if path.is_file() else {}
    except OSError as error:
        raise UserError(f"{path}: cannot read the records ({error.strerror})") from error
