"""JSON Lines: one record a line, blank lines skipped."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, BinaryIO

from ilvr_ds.data.sample import SampleError
from ilvr_ds.ingest.containers.source import RECORD_BYTES_LIMIT, Entry
from ilvr_ds.ingest.record import Record, kind


def read_lines(stream: BinaryIO) -> Iterator[Entry]:
    """The lines that are not blank, numbered from 1. A line above RECORD_BYTES_LIMIT is rejected unread."""
    number = 0
    while line := stream.readline(RECORD_BYTES_LIMIT + 1):
        number += 1
        if len(line) > RECORD_BYTES_LIMIT:
            _skip_line(stream)
            yield Entry(number, SampleError(f"the line has more than {RECORD_BYTES_LIMIT} bytes"))
        elif line.strip():
            yield Entry(number, parse_or_error(line))


def parse_or_error(text: bytes | str) -> Record | SampleError:
    """The record of a JSON text, or why it is none."""
    try:
        return parse_record(text)
    except SampleError as error:
        return error


def parse_record(text: bytes | str) -> Record:
    """The record of a JSON text; raises SampleError where it is not one JSON object with each key once."""
    try:
        record = json.loads(text, object_pairs_hook=_unique)
    except SampleError:
        raise
    except (ValueError, RecursionError) as error:
        raise SampleError(f"not valid JSON ({error})") from error
    if not isinstance(record, dict):
        raise SampleError(f"expected a JSON object, found {kind(record)}")
    return record


def _skip_line(stream: BinaryIO) -> None:
    while (part := stream.readline(RECORD_BYTES_LIMIT)) and not part.endswith(b"\n"):
        pass


def _unique(pairs: list[tuple[str, Any]]) -> Record:
    """JSON alone would take the last of two equal keys and say nothing."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
        raise SampleError(f"the key '{twice}' stands twice")
    return found
