"""Tables of the `formats` extra: parquet files by row group, and data set folders or hub names through `datasets`.

Images are columns as the `datasets` library stores them (`bytes` and `path`), bytes, or paths.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ilvr_ds.errors import UserError, nearest
from ilvr_ds.ingest.containers.source import Entry, Source, missing_library, plain

_ROWS = 16
_SAVED = ("state.json", "dataset_dict.json")
HUB = "hf:"
_JSON = "extension<arrow.json>"
"""The type in which `datasets` keeps objects that do not all have the same keys, as the steps of a plan."""


def read_parquet(path: Path) -> Iterator[Entry]:
    """The rows of a parquet file, numbered from 1; raises UserError where it is damaged or pyarrow is missing."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise missing_library(str(path), "a parquet file", "pyarrow") from error
    try:
        with parquet.ParquetFile(path) as table:
            names = table.schema_arrow.names
            if twice := next((name for name in names if names.count(name) > 1), ""):
                raise UserError(f"{path}: the column '{twice}' stands twice; rename one of them")
            yield from _rows(table.iter_batches(batch_size=_ROWS))
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable parquet file ({_first_line(error)})") from error


def open_dataset(name: str, subset: str | None, split: str | None) -> Source:
    """A data set folder, or `hf:OWNER/NAME` on the hub, through the `datasets` library.

    A folder is one that `save_to_disk` wrote, or has the layout of a hub repository. Hub data sets are streamed at the
    commit that is the newest now. Raises UserError for what `datasets` cannot read, where a split must be named,
    and for a subset of what was saved.
    """
    try:
        import datasets
    except ImportError as error:
        raise missing_library(name, "a Hugging Face data set", "datasets") from error
    is_saved = any((Path(name) / file).is_file() for file in _SAVED)
    if is_saved and subset is not None:
        raise UserError(f"{name}: `save_to_disk` wrote it, so it has no subsets; leave --subset out")
    origin = {} if is_saved or not name.startswith(HUB) else {"revision": _newest_commit(name)}
    try:
        if is_saved:
            loaded = datasets.load_from_disk(name)
        else:
            place = name.removeprefix(HUB)
            loaded = datasets.load_dataset(place, subset, streaming=True, revision=origin.get("revision"))
    except _faults() as error:
        raise UserError(f"{name}: the `datasets` library cannot read it ({_first_line(error)})") from error
    chosen, used = _split(loaded, split, name)
    what = f"{'a saved data set' if is_saved else 'a data set'} read by `datasets`{f', split {used}' if used else ''}"
    origin |= {"dataset": name if name.startswith(HUB) else Path(name).name} | ({"split": used} if used else {})
    return Source(name, Path(name).name, what, "row", lambda: _dataset_rows(chosen, name), origin)


def _dataset_rows(dataset: Any, label: str) -> Iterator[Entry]:
    """Through Arrow, so that images stay the bytes that they are."""
    try:
        yield from _rows(table for table in dataset.with_format("arrow").iter(batch_size=_ROWS))
    except _faults() as error:
        raise UserError(f"{label}: the data set cannot be read ({_first_line(error)})") from error


def _rows(tables: Iterator[Any]) -> Iterator[Entry]:
    number = 0
    for table in tables:
        in_json = [column for column in table.schema if _JSON in str(column.type)]
        for row in table.to_pylist():
            row |= {column.name: _parsed(row[column.name], column.type) for column in in_json}
            number += 1
            yield Entry(number, plain(row))


def _parsed(value: Any, type: Any) -> Any:
    """A value of an Arrow type, with objects where it holds their JSON."""
    if value is None or _JSON not in str(type):
        return value
    if isinstance(value, str):
        return json.loads(value)
    if isinstance(value, list):
        return [_parsed(item, type.value_type) for item in value]
    return {field.name: _parsed(value[field.name], field.type) for field in type}


def _split(loaded: Any, split: str | None, name: str) -> tuple[Any, str]:
    """The split that is named, or the only one."""
    if not isinstance(loaded, dict):  # one that was saved by itself
        if split is not None:
            raise UserError(f"{name}: the data set has no splits; leave --split out")
        return loaded, ""
    names = [str(found) for found in loaded]
    chosen = split if split is not None else names[0] if len(names) == 1 else None
    if chosen is None:
        raise UserError(f"{name}: the data set has the splits {', '.join(names)}; name one with --split")
    if chosen not in names:
        raise UserError(f"{name}: the data set has no split '{chosen}'{nearest(chosen, names)}")
    return loaded[chosen], chosen


def _newest_commit(name: str) -> str:
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(name.removeprefix(HUB)).sha)
    except _faults() as error:
        raise UserError(f"{name}: no such data set can be reached on the hub ({_first_line(error)})") from error


def _faults() -> tuple[type[Exception], ...]:
    """What `datasets` and the hub's client raise for data and networks."""
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of the HTTP library that it uses

    return OSError, ValueError, TypeError, RuntimeError, LookupError, HTTPError


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
