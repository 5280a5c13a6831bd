"""The page of all settings, docs/settings.md: made of the sections' classes, so that it cannot say anything else."""

from __future__ import annotations

import ast
import inspect
import typing
from collections.abc import Iterator
from typing import Any, Literal

from ilvr_ds.config.data_sections import REQUIRED, DataSetConfig
from ilvr_ds.config.limits import LIMITS
from ilvr_ds.config.recipe import Recipe

_HEAD = """# Settings

Every key of a recipe, `section.key` for `--set`. `ilvr-ds settings > docs/settings.md` writes this page from
`ilvr_ds/config/sections.py` and `data_sections.py`, and a test holds it to that. ZeRO, offload and communication stand
in the DeepSpeed JSON, and only there.
"""
_KINDS: dict[Any, str] = {
    DataSetConfig: "entry",
    int: "integer",
    float: "number",
    str: "text",
    bool: "true or false",
    type(None): "null",
}


def settings_page() -> str:
    """The page as Markdown: a table for each section."""
    parts = [_HEAD]
    for section, cls in typing.get_type_hints(Recipe).items():
        parts.append(f"## {section}\n{_one_line(inspect.getdoc(cls) or '')}\n")
        parts.append(_table(section, cls))
        if section == "data":
            parts.append(f"### An entry of data.shards\n{_one_line(inspect.getdoc(DataSetConfig) or '')}\n")
            parts.append(_table("data.shards", DataSetConfig))
    return "\n".join(parts)


def _table(section: str, cls: Any) -> str:
    return "\n".join(["| key | value | default | |", "|---|---|---|---|", *_rows(section, cls)]) + "\n"


def _rows(section: str, cls: Any) -> Iterator[str]:
    kinds, texts = typing.get_type_hints(cls), _texts(cls)
    for name, kind in kinds.items():
        default = getattr(cls, name, REQUIRED)
        cells = (f"`{name}`", _kind(kind, f"{section}.{name}"), _default(default), texts[name])
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _texts(cls: Any) -> dict[str, str]:
    """The string below each field."""
    [tree] = ast.parse(inspect.getsource(cls)).body
    assert isinstance(tree, ast.ClassDef)
    texts = {}
    for field, below in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(below, ast.Expr):
            texts[field.target.id] = _one_line(ast.literal_eval(below.value))
    return texts


def _kind(kind: Any, key: str) -> str:
    """A type in words, with the range of a number."""
    if typing.get_origin(kind) is Literal:
        return ", ".join(f"`{word}`" for word in typing.get_args(kind))
    if typing.get_origin(kind) in (tuple, list):
        return "list of " + _kind(typing.get_args(kind)[0], key)
    if options := typing.get_args(kind):
        return " or ".join(_kind(option, key) for option in options)
    span = ", {} to {}".format(*map(_number, LIMITS[key])) if key in LIMITS and kind in (int, float) else ""
    return f"{_KINDS.get(kind, str(kind))}{span}"


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _default(value: Any) -> str:
    if value == REQUIRED:
        return "required"
    if value == "":
        return ""
    if isinstance(value, tuple):
        return ", ".join(f"`{part}`" for part in value)
    return "null" if value is None else f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _one_line(text: str) -> str:
    return " ".join(text.split())
