"""Single values of a recipe: from what YAML gives to the type that a key has."""

from __future__ import annotations

import datetime
import typing
from dataclasses import dataclass
from typing import Any, Literal

from ilvr_ds.config.data_sections import DataSetConfig
from ilvr_ds.config.limits import LIMITS
from ilvr_ds.config.mixture import read_entries
from ilvr_ds.errors import UserError, nearest


@dataclass(frozen=True)
class Written:
    """A value as it was written, and where."""

    value: Any
    where: str


_KIND_NAMES = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}
_BOOL_STANDS_FOR = {
    ("model.activation_checkpointing", False): "none",
    ("model.activation_checkpointing", True): "full",
}
"""Keys that used to be true or false: older recipes and checkpoints stay valid."""


def convert(item: Written, kind: Any, key: str) -> Any:
    """The value of `key` as `kind`, its type annotation. Raises UserError.

    An integer may stand for a number, a list for a tuple, an unquoted date for a string. Nothing else is coerced.
    """
    value = item.value
    if isinstance(value, bool):
        value = _BOOL_STANDS_FOR.get((key, value), value)
    options = typing.get_args(kind)
    if tuple[DataSetConfig, ...] in options:
        if isinstance(value, list):
            return read_entries(value, item.where)
        kind, options = str, ()
    words = next((option for option in (kind, *options) if typing.get_origin(option) is Literal), None)
    is_count = int in options and type(value) is int
    if words is not None and not is_count:
        return _word(value, [*typing.get_args(words)], int in options, f"{item.where}: {key}")
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise UserError(f"{item.where}: {key} is {value!r}; expected a list of strings")
        return tuple(value)
    if type(None) in options:
        if value is None:
            return None
        kind = next(option for option in options if option is not type(None))
    return _plain(value, int if is_count else kind, key, item.where)


def _word(value: Any, known: list[Any], may_be_count: bool, what: str) -> Any:
    """One of the `known` values of a Literal."""
    if value in known and not isinstance(value, bool):
        return value
    names = [str(word) for word in known] + ["an integer"] * may_be_count
    hint = nearest(value, names) if isinstance(value, str) else ""
    hint = hint if "did you mean" in hint else ""
    raise UserError(f"{what} is {value!r}; valid: {', '.join(names)}{hint}")


def _plain(value: Any, kind: Any, key: str, where: str) -> Any:
    """An int, float, str or bool within its limits."""
    if kind is float and isinstance(value, str):
        # YAML 1.1 reads 1e-5 (without a dot) as a string; users mean a number.
        try:
            value = float(value)
        except ValueError:
            raise UserError(f"{where}: {key} is '{value}'; expected a number") from None
    if kind is float and type(value) is int:
        value = float(value)
    if kind is str and type(value) is datetime.date:
        value = value.isoformat()  # as it was written: YAML takes no other form of a date
    if type(value) is not kind:
        quoted = f"; to have it as text, quote it: \"'{value}'\"" if kind is str and value is not None else ""
        raise UserError(f"{where}: {key} is {value!r}; expected {_KIND_NAMES[kind]}{quoted}")
    low, high = LIMITS.get(key, (float("-inf"), float("inf")))
    if kind in (int, float) and not low <= value <= high:
        raise UserError(f"{where}: {key} is {value}; expected a value from {low:g} to {high:g}")
    return value
