"""What all containers give: records with their numbers, and what to call them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ilvr_ds.data.sample import SampleError
from ilvr_ds.errors import UserError
from ilvr_ds.ingest.record import Record

RECORD_BYTES_LIMIT = 256 * 1024 * 1024
"""No record may be larger, its images in base64 included: it is held in memory as a whole."""

Unit = Literal["line", "record", "row", "sample"]


@dataclass(frozen=True)
class Entry:
    """A record by its number from 1, or why it is none. `files` are images that came with it, by their names."""

    number: int
    record: Record | SampleError
    files: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """Records that can be read once, in order, a few at a time.

    `label` is for messages, `stem` begins the ids of records without one, `what` says what the container was taken
    for, `unit` is what numbers count.
    """

    label: str
    stem: str
    what: str
    unit: Unit
    entries: Callable[[], Iterator[Entry]]
    origin: Mapping[str, str] = field(default_factory=dict)
    """What `dataset.json` says of it."""


def missing_library(label: str, what: str, library: str) -> UserError:
    """The error for an optional library that is not installed."""
    return UserError(f"{label}: {what} needs {library}; pip install '.[formats]'")


def plain(value: Any) -> Any:
    """A table's value as JSON would hold it.

    Keys that hold null are left out: in a table every row has every key. Whole numbers are integers: a column of
    integers with one missing is a column of floats, and 2.0 is no answer where the text says 2.
    """
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return [plain(item) for item in value] if isinstance(value, list) else value
