"""Records read into samples, in any of FORMATS and any container; each format and each container has its file.

All have in common: `id`, which may be absent; `answer`, where the format's own keys hold none; and the group, which is
`group`, or the first text of `operation`, `type` and `level`, or what the format takes for it, or else CoMT's operation
or VSP's level among the first image's folders. All other keys, and `operation`, `type` and `level`, are kept in `meta`:
texts, and the rest as JSON. So is `answer` where it differs from what the format's own keys hold.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from ilvr_ds.data.check import check_sample
from ilvr_ds.data.sample import IMAGE_MARKER, LatentStep, Sample, SampleError, TextStep
from ilvr_ds.errors import UserError, nearest
from ilvr_ds.ingest.containers.source import Entry, Source
from ilvr_ds.ingest.formats.comt import COMT
from ilvr_ds.ingest.formats.conversations import CONVERSATIONS
from ilvr_ds.ingest.formats.ilvr import ILVR
from ilvr_ds.ingest.formats.lvr import LVR
from ilvr_ds.ingest.formats.mirage import MIRAGE
from ilvr_ds.ingest.formats.monet import MONET
from ilvr_ds.ingest.formats.visual_cot import VISUAL_COT
from ilvr_ds.ingest.formats.zebra_cot import ZEBRA_COT
from ilvr_ds.ingest.image_files import Helper, cut_box, path_below, read_picture_file
from ilvr_ds.ingest.picture import Picture
from ilvr_ds.ingest.record import Draft, Record, RecordFormat, short_text

Format = Literal["auto", "ilvr", "mirage", "comt", "zebra-cot", "monet", "lvr", "visual-cot", "conversations"]
FORMATS = (ILVR, MIRAGE, COMT, ZEBRA_COT, MONET, LVR, VISUAL_COT, CONVERSATIONS)
Tell = Callable[[str], None]

_COMMON_KEYS = {"id", "group", "answer"}
_GROUP_KEYS = ("operation", "type", "level")
_GROUP_FOLDERS = re.compile(r"creation|deletion|update|selection|level_?\d+")
_OTHER_MARKER = re.compile(r"<\|?(?!(?-i:image>))image[ _-]?\d*\|?>", re.IGNORECASE)
"""Markers of other formats, as <image_1>: they would be words about images that stand before the text."""


@dataclass(frozen=True)
class Rejected:
    """A record that did not become a sample: its line or number (from 1), its id and the reason in one line."""

    line: int
    id: str
    reason: str


def check_request(image_root: Path, format: str) -> None:
    """Raise UserError for a format that does not exist and a folder that is none."""
    if format not in get_args(Format):
        raise UserError(f"format '{format}' is unknown{nearest(format, get_args(Format))}")
    if not image_root.is_dir():
        raise UserError(f"{image_root}: the image root is not a folder")


class Importer:
    """Iterates over a source's records in their order: their numbers, and samples or reasons.

    Every image is read and decoded once. A record without an id gets the source's stem and its number. Raises UserError
    where the format cannot be told.

    `helper` is what a box makes of its image. `tell` is given one line when the first record shows what the input is
    taken for and why, and one for each further format of the same family. `formats` names them, with their records.
    """

    def __init__(
        self,
        source: Source,
        image_root: Path,
        format: Format = "auto",
        helper: Helper = "crop",
        tell: Tell | None = None,
    ) -> None:
        self.formats: dict[str, int] = {}
        self._source, self._root, self._helper, self._tell = source, image_root, helper, tell
        self._is_auto = format == "auto"
        self._chosen = next((known for known in FORMATS if known.name == format), None)

    def __iter__(self) -> Iterator[tuple[int, Sample | Rejected]]:
        first_numbers: dict[str, int] = {}
        for entry in self._source.entries():
            number, identity = entry.number, f"{self._source.stem}-{entry.number}"
            try:
                if isinstance(entry.record, SampleError):
                    raise entry.record
                identity = short_text(entry.record, "id") or identity
                sample = self._sample(entry, entry.record, identity)
                if first_numbers.setdefault(identity, number) != number:
                    raise SampleError(f"the id already stands in {self._source.unit} {first_numbers[identity]}")
            except SampleError as error:
                yield number, Rejected(number, identity, str(error))
            else:
                yield number, sample

    def _sample(self, entry: Entry, record: Record, identity: str) -> Sample:
        format, why = self._format(record, entry.number)
        if self._tell and format.name not in self.formats:
            self._tell(f"{self._source.label}: {self._source.what}, taken for {format.name}: {why}")
        self.formats[format.name] = self.formats.get(format.name, 0) + 1
        images = _Images(self._root, entry.files, self._helper)
        sample = _convert(record, identity, format.read(record), format, images)
        if entry.files and not {*sample.input_images, *sample.helper_images} & {*entry.files.values()}:
            name = next(iter(entry.files))
            raise SampleError(f"'{name}' came with the record, which shows it nowhere; name it as {format.name} does")
        return sample

    def _format(self, record: Record, number: int) -> tuple[RecordFormat, str]:
        """The format of a record and why; with `auto` the first record tells it, and later ones only of its family."""
        where = f"{self._source.unit} {number}"
        if self._chosen is not None and not self._is_auto:
            return self._chosen, "as --format says"
        format, why = _recognise(record, self._chosen, f"{self._source.label}:{number}")
        self._chosen = format
        return format, f"of {where}, {why}"


@dataclass(frozen=True)
class _Images:
    """Reads the images of one record."""

    root: Path
    files: Mapping[str, bytes]
    helper: Helper

    def read(self, picture: Picture, what: str) -> bytes:
        return read_picture_file(picture, self.root, self.files, what)

    def helpers(self, draft: Draft) -> tuple[tuple[bytes, ...], dict[int, LatentStep]]:
        """The helper images, boxes cut out, and the steps whose regions that makes."""
        images, steps = [], {}
        for number, picture in enumerate(draft.helper_images):
            data = self.read(picture, "helper image")
            if picture.box is not None:
                data, region = cut_box(data, picture.box, self.helper)
                steps[number] = LatentStep(number, region)
            images.append(data)
        return tuple(images), steps


def _recognise(record: Record, chosen: RecordFormat | None, where: str) -> tuple[RecordFormat, str]:
    """The format of a record and what shows it; raises UserError where none or several do, or another than before."""
    told = {format.name: why for format in FORMATS if (why := format.recognise(record))}
    if CONVERSATIONS.name in told and len(told) > 1:
        del told[CONVERSATIONS.name]  # the others of its family say more
    if not told and not chosen and "text_input" in record:
        told = {MIRAGE.name: "it has 'text_input' without any output, as Mirage's test sets"}
    found = next((format for format in FORMATS if format.name in told), chosen)
    if found is None or len(told) > 1 or not (chosen in (None, found) or (chosen and _are_akin(chosen, found))):
        names = ", ".join(told) if len(told) > 1 else "no known format"
        kind = "mixes formats with the lines before" if chosen else f"fits {names}"
        keys = ", ".join(sorted(map(str, record)))
        raise UserError(f"{where}: the record {kind} (keys: {keys}); split the file or give the format")
    return found, told.get(found.name, "it has no other format's keys")


def _are_akin(one: RecordFormat, other: RecordFormat) -> bool:
    return bool(one.family) and one.family == other.family


def _convert(record: Record, identity: str, draft: Draft, format: RecordFormat, images: _Images) -> Sample:
    inputs = tuple(images.read(picture, "input image") for picture in draft.input_images)
    helpers, cut = images.helpers(draft)
    steps = (cut.get(step.helper, step) if isinstance(step, LatentStep) else step for step in draft.steps)
    if any(IMAGE_MARKER in step.content for step in draft.steps if isinstance(step, TextStep)):
        raise SampleError(f"the plan's text holds {IMAGE_MARKER}, which is no image there; make it a latent step")
    stated = short_text(record, "answer")
    sample = Sample(
        id=identity,
        question=draft.question,
        steps=tuple(steps),
        input_images=inputs,
        helper_images=helpers,
        answer=draft.answer or stated,
        group=_group(record, draft, images.root),
        meta=_meta(record, format, is_answer_used=not draft.answer or stated in ("", draft.answer)),
        history=tuple(draft.history),
    )
    if inputs and (other := _OTHER_MARKER.search("\n".join(sample.user_texts))):
        raise SampleError(f"'{other[0]}' stands in the text, which marks no image; write {IMAGE_MARKER}")
    check_sample(sample)
    return sample


def _meta(record: Record, format: RecordFormat, is_answer_used: bool) -> dict[str, str]:
    """What the sample holds nowhere else; a key `answer` too, where the format's own answer is another."""
    used = _COMMON_KEYS if is_answer_used else _COMMON_KEYS - {"answer"}
    keys = (key for key in record if key not in used and not format.own_keys.fullmatch(key))
    return {key: _kept(record[key]) for key in keys}


def _kept(value: Any) -> str:
    """A value of `meta`; of bytes and other things that JSON has no word for only what they are."""
    return value if isinstance(value, str) else json.dumps(value, default=_shown)


def _shown(value: Any) -> str:
    return f"<{len(value)} bytes>" if isinstance(value, bytes) else str(value)


def _group(record: Record, draft: Draft, root: Path) -> str:
    if named := short_text(record, "group"):
        return named
    for key in _GROUP_KEYS:
        if isinstance(value := record.get(key), str) and value:
            return value
    if draft.group:
        return draft.group
    first = draft.input_images[0] if draft.input_images else Picture()
    path = path_below(root, first.paths[0], "input image") if first.paths and first.data is None else Path()
    for folder in path.parts[:-1]:
        if _GROUP_FOLDERS.fullmatch(folder):
            return folder.replace("_", "")
    return ""
