"""A record before its images are read: what a format makes of it, and how its values are checked."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ilvr_ds.data.sample import SampleError, Step

Record = dict[str, Any]


@dataclass(frozen=True)
class Draft:
    """What a record says of a sample; images are paths as the record gives them."""

    question: str
    steps: list[Step]
    input_images: list[str]
    helper_images: list[str]
    answer: str = ""
    """"" where it is not in the keys of the format; a key `answer` is then taken."""


@dataclass(frozen=True)
class RecordFormat:
    """One format of records."""

    name: str
    keys: frozenset[str]
    """Keys that no other format has: a record with one of them is of this format."""
    read: Callable[[Record], Draft]
    """Raises SampleError where a part is missing or of the wrong kind."""


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


def paths(record: Record, key: str) -> list[str]:
    """A path, a list of paths, or nothing, as a list."""
    value = record.get(key)
    found = value if isinstance(value, list) else [] if value is None else [value]
    for path in found:
        if not isinstance(path, str) or not path:
            what = "an empty path" if path == "" else kind(path)
            raise SampleError(f"'{key}' holds {what}, expected a path or a list of paths")
    return found


def kind(value: Any) -> str:
    """A JSON value's type in words."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
