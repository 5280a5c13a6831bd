"""A record before its images are read: what a format makes of it, and how its values are checked."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ilvr_ds.data.sample import SampleError, Step, Turn
from ilvr_ds.ingest.picture import Picture, read_picture

Record = dict[str, Any]


@dataclass(frozen=True)
class Draft:
    """What a record says of a sample, with its images as the record gives them."""

    question: str
    steps: list[Step]
    input_images: list[Picture]
    helper_images: list[Picture]
    answer: str = ""
    """"" where it is not in the keys of the format; a key `answer` is then taken."""
    history: list[Turn] = field(default_factory=list)
    """Turns of the conversation before the question."""
    group: str = ""
    """"" where the format has no key for it; see importers.py."""


@dataclass(frozen=True)
class RecordFormat:
    """One format of records."""

    name: str
    own_keys: re.Pattern[str]
    """Keys that the format reads; all others are kept beside the sample."""
    recognise: Callable[[Record], str]
    """What a record has that shows it to be of this format; "" where it has nothing of the kind."""
    read: Callable[[Record], Draft]
    """Raises SampleError where a part is missing or of the wrong kind."""
    family: str = ""
    """Formats of one family may stand side by side in one file; "" is no family."""


def has_keys(*keys: str) -> Callable[[Record], str]:
    """Recognises a format by keys that no other has: one of them is enough. A key that holds null is absent."""

    def recognise(record: Record) -> str:
        found = [key for key in keys if record.get(key) is not None]
        return f"it has the key '{found[0]}'" if found else ""

    return recognise


def text(record: Record, key: str) -> str:
    """A text that must be there and not be blank."""
    if key not in record:
        raise SampleError(f"missing key '{key}'")
    value = record[key]
    if not isinstance(value, str):
        raise SampleError(f"'{key}' is {kind(value)}, expected text")
    if not value.strip():
        raise SampleError(f"'{key}' is empty")
    return value


def short_text(record: Record, key: str) -> str:
    """A name, an answer or a number as text; "" where it is absent or null."""
    value = record.get(key)
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise SampleError(f"'{key}' is {kind(value)}, expected text or a number")
    if isinstance(value, float) and not math.isfinite(value):
        raise SampleError(f"'{key}' is {value}, which is neither text nor a JSON number; expected text or a number")
    return str(value)


def items(record: Record, key: str) -> list[Any]:
    """A list that must be there and not be empty."""
    if record.get(key) is None:
        raise SampleError(f"missing key '{key}'")
    value = record[key]
    if not isinstance(value, list):
        raise SampleError(f"'{key}' is {kind(value)}, expected a list")
    if not value:
        raise SampleError(f"'{key}' is an empty list")
    return value


def picture(record: Record, key: str) -> Picture:
    """An image that must be there."""
    if key not in record:
        raise SampleError(f"missing key '{key}'")
    return _picture(record[key], key, "an image")


def pictures(record: Record, *keys: str) -> list[Picture]:
    """An image, a list of images, or nothing, as a list; of several `keys` the first that is there counts."""
    key = next((key for key in keys if record.get(key) is not None), keys[0])
    value = record.get(key)
    found = value if isinstance(value, list) else [] if value is None else [value]
    return [_picture(item, key, "a path or a list of paths") for item in found]


def _picture(value: Any, key: str, expected: str) -> Picture:
    found = read_picture(value)
    if found is None:
        what = "an empty path" if value == "" else kind(value)
        raise SampleError(f"'{key}' holds {what}, expected {expected}")
    return found


def kind(value: Any) -> str:
    """The type of a value of JSON, or of a table, in words."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null", bytes: "bytes"}
    names |= {int: "a number", float: "a number"}
    return names.get(type(value), f"of the table's type {type(value).__name__}")
