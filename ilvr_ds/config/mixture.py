"""The list that `data.shards` is in a mixture: its entries, checked, each with a name."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Any

from ilvr_ds.config.data_sections import DataSetConfig
from ilvr_ds.errors import UserError, nearest

LARGEST = 1e6
"""No weight and no number of epochs is larger."""
_KEYS = tuple(field.name for field in dataclasses.fields(DataSetConfig))
_NUMBERS = ("weight", "epochs")


def read_entries(value: list[Any], where: str) -> tuple[DataSetConfig, ...]:
    """The data sets of a mixture; `where` begins every message. Raises UserError."""
    where = f"{where}: data.shards"
    if not value:
        raise UserError(f"{where}: the list is empty; give a path, or entries {{path, weight}} or {{path, epochs}}")
    entries = [_entry(item, f"{where}, entry {number}") for number, item in enumerate(value, start=1)]
    for path, count in Counter(_plain(entry.path) for entry in entries).items():
        if count > 1:
            raise UserError(f"{where}: {path} stands there {count} times; give one entry more weight or epochs")
    entries = _with_numbers(entries, where)
    names = _names([entry.path for entry in entries])
    named = tuple(
        dataclasses.replace(entry, name=entry.name or name) for entry, name in zip(entries, names, strict=True)
    )
    for name, count in Counter(entry.name for entry in named).items():
        if count > 1:
            paths = " and ".join(entry.path for entry in named if entry.name == name)
            raise UserError(f"{where}: {paths} are both called '{name}'; give each entry a name of its own")
    return named


def _entry(item: Any, where: str) -> DataSetConfig:
    if isinstance(item, str):
        item = {"path": item}
    if not isinstance(item, dict):
        raise UserError(f"{where} is {item!r}; expected a path, or {{path, weight}} or {{path, epochs}}")
    for key in item:
        if key not in _KEYS:
            raise UserError(f"{where}: unknown key '{key}'{nearest(str(key), _KEYS)}")
    values = {key: value for key, value in item.items() if value is not None}
    if "path" not in values:
        raise UserError(f"{where}: has no path")
    for key, value in values.items():
        if key in _NUMBERS:
            values[key] = _number(value, f"{where}: {key}")
        elif not isinstance(value, str) or not (value or key == "name"):
            raise UserError(f"{where}: {key} is {value!r}; expected a string")
    entry = DataSetConfig(**values)
    if entry.weight is not None and entry.epochs is not None:
        raise UserError(f"{where}: has weight and epochs, which both say how often {entry.path} is seen; keep one")
    if entry.eval_features is not None and (entry.features is None or entry.eval_shards is None):
        raise UserError(f"{where}: eval_features needs features and eval_shards beside it; remove it")
    return entry


def _number(value: Any, what: str) -> float:
    """A weight or a number of epochs; YAML reads 1e-3 as a string."""
    try:
        number = float(value) if type(value) in (int, float, str) else None
    except ValueError:
        number = None
    if number is None:
        raise UserError(f"{what} is {value!r}; expected a number")
    if not 0 < number <= LARGEST:
        advice = "; to leave the set out, remove its entry" if number == 0 else ""
        raise UserError(f"{what} is {number:g}; expected a number above 0, at most {LARGEST:g}{advice}")
    return number


def _with_numbers(entries: list[DataSetConfig], where: str) -> list[DataSetConfig]:
    """The entries with their weights, or all with epochs."""
    weighted = [entry for entry in entries if entry.weight is not None]
    if not weighted:
        return [dataclasses.replace(entry, epochs=entry.epochs or 1.0) for entry in entries]
    for entry in entries:
        if entry.weight is None:
            has = "none" if entry.epochs is None else f"epochs {entry.epochs:g}"
            raise UserError(
                f"{where}: {weighted[0].path} has a weight, {entry.path} has {has}; give all sets a weight, or none"
            )
    return entries


def _plain(path: str) -> str:
    """A path in one spelling."""
    return path.rstrip("/") if re.match(r"https?:", path) else str(Path(path).absolute())


def _names(paths: list[str]) -> list[str]:
    """The last part of each path; of data/a/train and data/b/train the last that is not in all of them."""
    parts = [list(PurePosixPath(_plain(path)).parts) for path in paths]
    while len(paths) > 1 and len({rest[-1] for rest in parts}) == 1 and min(map(len, parts)) > 1:
        parts = [rest[:-1] for rest in parts]
    return [rest[-1] for rest in parts]
