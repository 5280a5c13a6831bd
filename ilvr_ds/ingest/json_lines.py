"""JSON Lines: one record a line, blank lines skipped."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ilvr_ds.data.sample import SampleError
from ilvr_ds.errors import UserError
from ilvr_ds.ingest.record import Record, kind


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, numbered from 1; raises UserError where the file cannot be read."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line
    except OSError as error:
        raise UserError(f"{path}: cannot read the records ({error.strerror})") from error


def parse_line(line: bytes) -> Record:
    """The record of a line; raises SampleError where it is not one JSON object with each key once."""
    try:
        record = json.loads(line, object_pairs_hook=_unique)
    except SampleError:
        raise
    except (ValueError, RecursionError) as error:
        raise SampleError(f"not valid JSON ({error})") from error
    if not isinstance(record, dict):
        raise SampleError(f"expected a JSON object, found {kind(record)}")
    return record


def _unique(pairs: list[tuple[str, Any]]) -> Record:
    """JSON alone would take the last of two equal keys and say nothing."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
        raise SampleError(f"the key '{twice}' stands twice")
    return found
