"""JSON Lines read into samples, in any of FORMATS; each format has a file of its own.

All have in common: `id`, which may be absent; `answer`, where the format's own keys hold none; and the group, which is
the first text of `group`, `operation`, `type` and `level`, or else CoMT's operation or VSP's level among the first
image's folders. All other keys, and `operation`, `type` and `level`, are kept in `meta`: texts, and the rest as JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal, get_args

from ilvr_ds.data.check import check_sample
from ilvr_ds.data.sample import Sample, SampleError
from ilvr_ds.errors import UserError, nearest
from ilvr_ds.ingest.foreign import foreign_record, refuse_foreign
from ilvr_ds.ingest.ilvr import ILVR
from ilvr_ds.ingest.image_files import path_below, read_image
from ilvr_ds.ingest.json_lines import parse_line, read_lines
from ilvr_ds.ingest.mirage import MIRAGE
from ilvr_ds.ingest.record import Record, RecordFormat, short_text

Format = Literal["auto", "ilvr", "mirage"]
FORMATS = (ILVR, MIRAGE)

_OWN_KEYS = {"id", "text_input", "image_input", "group", "answer"}.union(*(format.keys for format in FORMATS))
_GROUP_KEYS = ("group", "operation", "type", "level")
_GROUP_FOLDERS = re.compile(r"creation|deletion|update|selection|level_?\d+")


@dataclass(frozen=True)
class Rejected:
    """A record that did not become a sample: its line (from 1), its id and the reason in one line."""

    line: int
    id: str
    reason: str


def read_records(path: Path, image_root: Path, format: Format = "auto") -> Iterator[Sample | Rejected]:
    """The records of a JSON Lines file in their order, each as a sample or with the reason why not.

    Every image is read and decoded once. Blank lines are skipped; a record without an id gets the file's stem and
    its line number. Raises UserError where the file or `image_root` is missing and where the format cannot be told.
    """
    return (record for _, record in numbered_records(path, image_root, format))


def numbered_records(path: Path, image_root: Path, format: Format) -> Iterator[tuple[int, Sample | Rejected]]:
    """Like read_records, with line numbers."""
    if format not in get_args(Format):
        raise UserError(f"format '{format}' is unknown{nearest(format, get_args(Format))}")
    if not image_root.is_dir():
        raise UserError(f"{image_root}: the image root is not a folder")
    refuse_foreign(path)
    chosen = next((known for known in FORMATS if known.name == format), None)
    first_lines: dict[str, int] = {}
    for number, line in read_lines(path):
        identity = f"{path.stem}-{number}"
        try:
            record = parse_line(line)
            identity = short_text(record, "id") or identity
            if chosen is None or format == "auto":
                chosen = _choose_format(record, chosen, f"{path}:{number}")
            sample = _convert(record, identity, image_root, chosen)
            if first_lines.setdefault(identity, number) != number:
                raise SampleError(f"the id already stands in line {first_lines[identity]}")
        except SampleError as error:
            yield number, Rejected(number, identity, str(error))
        else:
            yield number, sample


def _choose_format(record: Record, chosen: RecordFormat | None, where: str) -> RecordFormat:
    """The format of the file: its first record tells it, and no later one may tell otherwise."""
    told = [format for format in FORMATS if format.keys & record.keys()]
    if not told and not chosen and "text_input" in record:
        told = [MIRAGE]  # a bare question: Mirage's test sets
    if not told and (foreign := foreign_record(record)):
        raise UserError(f"{where}: {foreign}")
    if len(told) > 1 or (chosen and told and told != [chosen]) or not (told or chosen):
        names = " nor the ".join(format.name for format in FORMATS)
        kind = "mixes formats with the lines before" if chosen else f"fits neither the {names} format"
        keys = ", ".join(sorted(map(str, record)))
        raise UserError(f"{where}: the record {kind} (keys: {keys}); split the file or give the format")
    return chosen or told[0]


def _convert(record: Record, identity: str, root: Path, format: RecordFormat) -> Sample:
    draft = format.read(record)
    inputs = [path_below(root, path, "input image") for path in draft.input_images]
    helpers = [path_below(root, path, "helper image") for path in draft.helper_images]
    sample = Sample(
        id=identity,
        question=draft.question,
        steps=tuple(draft.steps),
        input_images=tuple(read_image(root, path, "input image") for path in inputs),
        helper_images=tuple(read_image(root, path, "helper image") for path in helpers),
        answer=draft.answer or short_text(record, "answer"),
        group=_group(record, inputs),
        meta={k: v if isinstance(v, str) else json.dumps(v) for k, v in record.items() if k not in _OWN_KEYS},
    )
    check_sample(sample)
    return sample


def _group(record: Record, inputs: list[PurePosixPath]) -> str:
    for key in _GROUP_KEYS:
        if isinstance(value := record.get(key), str) and value:
            return value
    for folder in inputs[0].parts[:-1] if inputs else ():
        if _GROUP_FOLDERS.fullmatch(folder):
            return folder.replace("_", "")
    return ""
