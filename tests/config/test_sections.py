from __future__ import annotations

import ast
import dataclasses
import typing
from pathlib import Path

from ilvr_ds.config import Recipe, data_sections, sections

SECTIONS = typing.get_type_hints(Recipe)
KEYS = [f"{section}.{field.name}" for section, cls in SECTIONS.items() for field in dataclasses.fields(cls)]


def test_every_key_has_a_docstring_under_it() -> None:
    documented = set()
    files = [Path(module.__file__) for module in (sections, data_sections)]
    for node in [node for file in files for node in ast.parse(file.read_text()).body]:
        if not isinstance(node, ast.ClassDef):
            continue
        section = next((s for s, cls in SECTIONS.items() if cls.__name__ == node.name), None)
        for field, below in zip(node.body, node.body[1:], strict=False):
            is_text = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
            if isinstance(field, ast.AnnAssign) and is_text:
                documented.add(f"{section}.{ast.unparse(field.target)}")
    assert set(KEYS) - documented == set()
