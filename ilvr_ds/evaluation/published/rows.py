"""Rows of a data set's own files: words at once, pictures when they are asked for.

Parquet as Hugging Face's data sets have it, with pictures in it, and CSV or JSON Lines beside picture files.
"""

from __future__ import annotations

import base64
import binascii
import csv
import json
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from ilvr_ds.data.sample import SampleError
from ilvr_ds.errors import UserError

Values = dict[str, Any]


class Row(NamedTuple):
    """One record: its words, its file, and its place there."""

    values: Values
    """Without pictures that lie in the file itself."""
    file: Path
    number: int
    """From 0."""

    def text(self, *names: str) -> str:
        """The value of the first of these columns that the record has, as text; raises SampleError without one."""
        for name in names:
            if (value := self.values.get(name)) is not None:
                return str(value).strip()
        raise SampleError(f"no '{names[0]}'; it has {', '.join(sorted(self.values))}")

    def __str__(self) -> str:
        return f"{self.file}: row {self.number}"


def read_rows(files: Sequence[Path], pictures: frozenset[str]) -> list[Row]:
    """All rows of `files`, in their order, without the columns `pictures` of parquet files.

    Raises UserError where a file cannot be read.
    """
    return [row for file in files for row in _READERS[file.suffix](file, pictures)]


def picture(row: Row, column: str) -> bytes | None:
    """The encoded picture of a row, None where it has none.

    In parquet it is Hugging Face's {bytes, path} or text in base64; elsewhere a path relative to the file. Raises
    SampleError.
    """
    if row.file.suffix == ".parquet":
        return _embedded(row, column)
    name = PurePosixPath(row.text(column))
    if name.is_absolute() or ".." in name.parts:
        raise SampleError(f"'{name}' leaves the folder of {row.file}")
    try:
        return (row.file.parent / name).read_bytes()
    except OSError as error:
        raise SampleError(f"'{name}' cannot be read ({error.strerror})") from error


def _embedded(row: Row, column: str) -> bytes | None:
    value = _column(row.file, column, *_place(row))
    if isinstance(value, dict):
        value = value.get("bytes")
    if isinstance(value, str):
        try:
            value = base64.b64decode(value, validate=True)
        except binascii.Error as error:
            raise SampleError(f"'{column}' is no base64 ({error})") from error
    if value is not None and not isinstance(value, bytes):
        raise SampleError(f"'{column}' holds no picture; copy the data set again, with its pictures")
    return value or None


def _place(row: Row) -> tuple[int, int]:
    """Row group, and row in it."""
    number = row.number
    for group, count in enumerate(_group_sizes(row.file)):
        if number < count:
            return group, number
        number -= count
    raise IndexError(str(row))


@lru_cache(maxsize=64)
def _group_sizes(file: Path) -> tuple[int, ...]:
    metadata = _open(file).metadata
    return tuple(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))


def _column(file: Path, column: str, group: int, number: int) -> Any:
    return _group(file, group, column)[number].as_py()


@lru_cache(maxsize=4)
def _group(file: Path, group: int, column: str) -> Any:
    """A picture column of a row group: rows are read in order, so that each group is read about once."""
    return _open(file).read_row_group(group, columns=[column]).column(0)


def _open(file: Path) -> Any:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise UserError(f"{file}: parquet needs pyarrow: pip install '.[formats]'") from error
    try:
        return parquet.ParquetFile(file)
    except (ArrowException, OSError) as error:
        raise UserError(f"{file}: is no readable parquet file ({str(error).splitlines()[0]})") from error


def _parquet(file: Path, pictures: frozenset[str]) -> Iterable[Row]:
    opened = _open(file)
    words = [name for name in opened.schema_arrow.names if name not in pictures]
    for number, values in enumerate(opened.read(columns=words).to_pylist()):
        yield Row(values, file, number)


def _csv(file: Path, pictures: frozenset[str]) -> Iterable[Row]:
    with _reading(file) as lines:
        for number, values in enumerate(csv.DictReader(lines)):
            yield Row(values, file, number)


def _json_lines(file: Path, pictures: frozenset[str]) -> Iterable[Row]:
    with _reading(file) as lines:
        for number, line in enumerate(lines):
            try:
                values = json.loads(line)
            except ValueError as error:
                raise UserError(f"{file}: line {number + 1}: is no JSON ({error})") from error
            if not isinstance(values, dict):
                raise UserError(f"{file}: line {number + 1}: is no JSON object")
            yield Row(values, file, number)


def _reading(file: Path) -> Any:
    try:
        return file.open(encoding="utf-8-sig", newline="")
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error


_READERS = {".parquet": _parquet, ".csv": _csv, ".jsonl": _json_lines}
