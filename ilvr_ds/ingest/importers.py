"""JSON Lines in the authors' format or in Mirage's, read into samples.

One record a line. `text_input` is the question and `image_input` its images (a path, a list of paths, or absent),
below an image root. What the model shall answer is, in the two formats:

    ilvr    {"sequence_plan": [{"type": "text", "content": ...},
                               {"type": "latent", "helper_image": ..., "region": ...}, ...],
             "original_final_answer": ...}
    mirage  {"text_output": "<think> ... </think><output_image> ... \\boxed{A}.", "image_output": ...}

`region`, which may be absent, says what the step is about: a box [left, top, right, bottom] in pixels of the helper
image. Mirage's helper image stands where `<output_image>` (or `<image>`) stands in the text; without a marker it comes
before the text. `<think>` is text like any other. A Mirage record without both outputs, or an empty
`sequence_plan`, is a sample to evaluate on.

The answer for scoring is `original_final_answer`, Mirage's last `\\boxed{...}`, or else a key `answer`. The group is
`group`, `operation`, `type` or `level`, or else CoMT's operation or VSP's level among the first image's folders. All
other keys, and `operation`, `type` and `level`, are kept in `meta`, as JSON where they are not text.
"""

from __future__ import annotations

import json
import math
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args

from ilvr_ds.data.check import check_sample
from ilvr_ds.data.decode import decode_image
from ilvr_ds.data.sample import LatentStep, Region, Sample, SampleError, Step, TextStep
from ilvr_ds.errors import UserError, nearest
from ilvr_ds.ingest.foreign import foreign_record, refuse_foreign
from ilvr_ds.ingest.record_keys import check_keys

Format = Literal["auto", "ilvr", "mirage"]
IMAGE_BYTES_LIMIT = 64 * 1024 * 1024

_TELLING_KEYS = {"ilvr": {"sequence_plan", "original_final_answer"}, "mirage": {"text_output", "image_output"}}
_OWN_KEYS = {"id", "text_input", "image_input", "group", "answer"}.union(*_TELLING_KEYS.values())
_GROUP_KEYS = ("group", "operation", "type", "level")  # the first that holds a text
_GROUP_FOLDERS = re.compile(r"creation|deletion|update|selection|level_?\d+")
_OUTPUT_MARKERS = re.compile(r"<output_image>|<image>")


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
    chosen: str = "" if format == "auto" else format
    first_lines: dict[str, int] = {}
    for line, text in _lines(path):
        identity = f"{path.stem}-{line}"
        try:
            record = _parse(text)
            identity = _short_text(record, "id") or identity
            if format == "auto":
                chosen = _choose_format(record, chosen, f"{path}:{line}")
            sample = _convert(record, identity, image_root, chosen)
            if first_lines.setdefault(identity, line) != line:
                raise SampleError(f"the id stands already in line {first_lines[identity]}")
        except SampleError as error:
            yield line, Rejected(line, identity, str(error))
        else:
            yield line, sample


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with path.open("rb") as file:
            for line, text in enumerate(file, start=1):
                if text.strip():
                    yield line, text
    except OSError as error:
        raise UserError(f"{path}: cannot read the records ({error.strerror})") from error


def _parse(text: bytes) -> dict[str, Any]:
    try:
        record = json.loads(text, object_pairs_hook=_unique)
    except SampleError:
        raise
    except (ValueError, RecursionError) as error:
        raise SampleError(f"not valid JSON ({error})") from error
    if not isinstance(record, dict):
        raise SampleError(f"expected a JSON object, found {_kind(record)}")
    return record


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a record; JSON alone would take the last of two equal keys and say nothing."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
        raise SampleError(f"the key '{twice}' stands there twice")
    return found


def _choose_format(record: dict[str, Any], chosen: str, where: str) -> str:
    """The format of the file: told by its first record, and no later record may tell otherwise."""
    told = [name for name, keys in _TELLING_KEYS.items() if keys & record.keys()]
    if not told and not chosen and "text_input" in record:
        told = ["mirage"]  # a bare question: Mirage's test sets
    if not told and (foreign := foreign_record(record)):
        raise UserError(f"{where}: {foreign}")
    if len(told) > 1 or (chosen and told and told != [chosen]) or not (told or chosen):
        kind = "mixes formats with the lines before" if chosen else "fits neither the ilvr nor the mirage format"
        keys = ", ".join(sorted(map(str, record)))
        raise UserError(f"{where}: the record {kind} (keys: {keys}); split the file or give the format")
    return chosen or told[0]


def _convert(record: dict[str, Any], identity: str, root: Path, format: str) -> Sample:
    check_keys(record, has_answer=bool(_boxed(str(record.get("text_output")))))
    paths = [_below(root, path, "input image") for path in _paths(record, "image_input")]
    if format == "ilvr":
        steps, helpers = _plan(record)
        answer = _short_text(record, "original_final_answer")
    else:
        steps, helpers = _mirage_plan(record)
        answer = _boxed(record.get("text_output") or "")
    sample = Sample(
        id=identity,
        question=_text(record, "text_input"),
        steps=tuple(steps),
        input_images=tuple(_read_image(root, path, "input image") for path in paths),
        helper_images=tuple(_read_image(root, _below(root, path, "helper image"), "helper image") for path in helpers),
        answer=answer or _short_text(record, "answer"),
        group=_group(record, paths),
        meta={k: v if isinstance(v, str) else json.dumps(v) for k, v in record.items() if k not in _OWN_KEYS},
    )
    check_sample(sample)
    return sample


def _plan(record: dict[str, Any]) -> tuple[list[Step], list[str]]:
    """Steps and helper image paths of a `sequence_plan`."""
    if "sequence_plan" not in record:
        raise SampleError("missing key 'sequence_plan' (an empty list stands for a sample to evaluate on)")
    plan = record["sequence_plan"]
    if not isinstance(plan, list):
        raise SampleError(f"'sequence_plan' is {_kind(plan)}, expected a list")
    steps: list[Step] = []
    helpers: list[str] = []
    for number, step in enumerate(plan, start=1):
        try:
            if not isinstance(step, dict):
                raise SampleError(f"it is {_kind(step)}, expected an object")
            if (kind := _text(step, "type")) == "text":
                steps.append(TextStep(_text(step, "content")))
            elif kind == "latent":
                steps.append(LatentStep(len(helpers), _region(step)))
                helpers.append(_text(step, "helper_image"))
            else:
                raise SampleError(f"unknown type '{kind}'{nearest(kind, ('text', 'latent'))}")
        except SampleError as error:
            raise SampleError(f"step {number} of the plan: {error}") from error
    return steps, helpers


def _region(step: dict[str, Any]) -> Region | None:
    """The box of a latent step; whether it lies inside the image is checked with the sample."""
    value = step.get("region")
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 4 or not all(type(x) in (int, float) for x in value):
        raise SampleError(f"'region' is {json.dumps(value)}, expected [left, top, right, bottom] in pixels")
    left, top, right, bottom = value
    return left, top, right, bottom


def _mirage_plan(record: dict[str, Any]) -> tuple[list[Step], list[str]]:
    """Steps and helper image paths of `text_output` and `image_output`."""
    helpers = _paths(record, "image_output")
    if not helpers and record.get("text_output") is None:
        return [], []
    text = _text(record, "text_output")
    pieces = _OUTPUT_MARKERS.split(text)
    if len(pieces) == 1:
        pieces = [""] * len(helpers) + pieces
    if len(pieces) - 1 != len(helpers):
        raise SampleError(f"{len(pieces) - 1} image markers in 'text_output' but {len(helpers)} in 'image_output'")
    steps: list[Step] = [TextStep(pieces[0])] if pieces[0] else []
    for helper, piece in enumerate(pieces[1:]):
        steps += [LatentStep(helper), TextStep(piece)] if piece else [LatentStep(helper)]
    return steps, helpers


def _boxed(text: str) -> str:
    r"""What stands in the last `\boxed{...}` of `text`, braces inside it balanced; "" without one."""
    _, found, rest = text.rpartition(r"\boxed{")
    depth = 1
    for position, letter in enumerate(rest if found else ""):
        depth += (letter == "{") - (letter == "}")
        if depth == 0:
            return rest[:position].strip()
    return ""


def _group(record: dict[str, Any], paths: list[PurePosixPath]) -> str:
    """The kind of task: a key of the record, else CoMT's operation or VSP's level in the first image's folders."""
    for key in _GROUP_KEYS:
        if isinstance(value := record.get(key), str) and value:
            return value
    for folder in paths[0].parts[:-1] if paths else ():
        if _GROUP_FOLDERS.fullmatch(folder):
            return folder.replace("_", "")
    return ""


def _below(root: Path, name: str, what: str) -> PurePosixPath:
    """A path relative to `root`, also where a record gives it as absolute.

    It may not leave the root by itself; links that the user put there are followed.
    """
    path = PurePosixPath(name)
    if path.is_absolute():
        places = (place for place in (root.absolute(), root.resolve()) if path.is_relative_to(place))
        path = next((path.relative_to(place) for place in places), path)
    if path.is_absolute() or ".." in path.parts:
        raise SampleError(f"{what} '{name}': the path leaves the image root {root}")
    return path


def _read_image(root: Path, name: PurePosixPath, what: str) -> bytes:
    """The bytes of an image below `root`, which decode to an image of a bearable size."""
    try:
        data = _read_limited(root / name)
        decode_image(data)
    except FileNotFoundError as error:
        raise SampleError(f"{what} '{name}' is missing below {root}") from error
    except OSError as error:
        raise SampleError(f"{what} '{name}' cannot be read ({error.strerror})") from error
    except SampleError as error:
        raise SampleError(f"{what} '{name}': {error}") from error
    except ValueError as error:
        raise SampleError(f"{what} {str(name)!r}: no file can have this name") from error
    return data


def _read_limited(path: Path) -> bytes:
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise SampleError("not a file")
    if status.st_size > IMAGE_BYTES_LIMIT:
        raise SampleError(f"{status.st_size} bytes, the limit is {IMAGE_BYTES_LIMIT}")
    return path.read_bytes()


def _paths(record: dict[str, Any], key: str) -> list[str]:
    """A path, a list of paths, or nothing, as a list."""
    value = record.get(key)
    paths = value if isinstance(value, list) else [] if value is None else [value]
    for path in paths:
        if not isinstance(path, str) or not path:
            found = "an empty path" if path == "" else _kind(path)
            raise SampleError(f"'{key}' holds {found}, expected a path or a list of paths")
    return paths


def _text(record: dict[str, Any], key: str) -> str:
    """A text that must be there and not be blank."""
    if key not in record:
        raise SampleError(f"missing key '{key}'")
    value = record[key]
    if not isinstance(value, str):
        raise SampleError(f"'{key}' is {_kind(value)}, expected text")
    if not value.strip():
        raise SampleError(f"'{key}' is empty")
    return value


def _short_text(record: dict[str, Any], key: str) -> str:
    """A name, an answer or a number as text; "" where it is absent or null."""
    value = record.get(key)
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise SampleError(f"'{key}' is {_kind(value)}, expected text or a number")
    if isinstance(value, float) and not math.isfinite(value):
        raise SampleError(f"'{key}' is {value}, which no text and no number of JSON is; expected text or a number")
    return str(value)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
