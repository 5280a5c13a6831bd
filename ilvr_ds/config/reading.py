"""Recipes from YAML files, overrides and plain dictionaries."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from ilvr_ds.config.data_sections import REQUIRED
from ilvr_ds.config.limits import check_combinations
from ilvr_ds.config.recipe import Recipe
from ilvr_ds.config.values import Written, convert
from ilvr_ds.errors import UserError, first_line, nearest


class _OddYamlError(ValueError):
    """YAML that is valid and hardly what was meant."""


class _Loader(yaml.SafeLoader):
    """YAML where no key of a mapping stands twice, of which PyYAML takes the last, and no number is of base 8 or 60."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        for key, count in Counter(str(key.value) for key, _ in node.value).items():
            if count > 1:
                raise _OddYamlError(f"'{key}' stands twice in one mapping")
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        _check_base(node.value)
        return int(super().construct_yaml_int(node))

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        _check_base(node.value)
        return float(super().construct_yaml_float(node))


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_yaml_float)


def _check_base(text: str) -> None:
    """Raise _OddYamlError for 010, which YAML takes for 8, and 1:30, which is 90."""
    if ":" in text or re.fullmatch(r"[-+]?0[0-7_]+", text):
        base = 60 if ":" in text else 8
        raise _OddYamlError(f"{text} is a number of base {base} in YAML; write it in base 10, or as text: \"'{text}'\"")


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe file and apply `section.key=value` overrides.

    Raises UserError with file and line (or the override) for anything that is not a valid recipe.
    """
    path = Path(path)
    values = _read_yaml(path)
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            raise UserError(f"--set {override}: expected section.key=value")
        if not text.strip():
            raise UserError(f"--set {override}: no value; null stands for none, '' for an empty text")
        try:
            value = yaml.load(text, Loader=_Loader)
        except _OddYamlError as error:
            raise UserError(f"--set {override}: {error}") from error
        except (yaml.YAMLError, ValueError) as error:
            raise UserError(f"--set {override}: the value is not valid YAML") from error
        values[key.strip()] = Written(value, f"--set {override}")
    recipe = _build_recipe(values, missing_at=str(path))
    if recipe.run.output_dir.startswith(("~", "$")):  # what was written before, and there, can still be read
        where = f"run.output_dir '{recipe.run.output_dir}'"
        raise UserError(f"{path}: {where}: ~ and variables are a shell's; write the whole path")
    return recipe


def recipe_from_dict(sections: Mapping[str, Mapping[str, Any]]) -> Recipe:
    """The recipe of plain nested values, as `Recipe.to_dict` gives them. Raises UserError."""
    values = {f"{s}.{k}": Written(v, f"{s}.{k}") for s, keys in sections.items() for k, v in keys.items()}
    return _build_recipe(values, missing_at="recipe")


def _build_recipe(values: Mapping[str, Written], missing_at: str) -> Recipe:
    """Check keys, types, limits and combinations, and build the recipe. values: by dotted key."""
    sections, known = _kinds()
    parsed: dict[str, dict[str, Any]] = {section: {} for section in sections}
    for key, item in values.items():
        if key not in known:
            raise UserError(f"{item.where}: unknown key '{key}'{_nearest_key(key, known)}")
        section, _, name = key.partition(".")
        parsed[section][name] = convert(item, known[key], key)
    recipe = Recipe(**{section: cls(**parsed[section]) for section, cls in sections.items()})
    missing = [key for key, value in recipe.flat().items() if value == REQUIRED]
    if missing:
        raise UserError(f"{missing_at}: missing {', '.join(missing)}")
    check_combinations(recipe, missing_at)
    return recipe


@cache
def _kinds() -> tuple[dict[str, Any], dict[str, Any]]:
    """The sections' classes by name, and the type of each dotted key."""
    sections = typing.get_type_hints(Recipe)
    kinds = {f"{s}.{name}": kind for s, cls in sections.items() for name, kind in typing.get_type_hints(cls).items()}
    return sections, kinds


def _nearest_key(key: str, known: Iterable[str]) -> str:
    """A hint for an unknown key, which may lack its section ("lr")."""
    homes = sorted(name for name in known if name.partition(".")[2] == key)
    return f"; did you mean {' or '.join(map(repr, homes))}?" if homes else nearest(key, known)


def _read_yaml(path: Path) -> dict[str, Written]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot read the recipe ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: cannot read the recipe (not UTF-8 text)") from error
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{path}{at}: not valid YAML ({_reason(error)})") from error
    values: dict[str, Written] = {}
    sections = [f.name for f in dataclasses.fields(Recipe)]
    for section, section_node, line in _items(root, path, "the recipe"):
        if section not in sections:
            raise UserError(f"{path}:{line}: unknown section '{section}'{nearest(section, sections)}")
        for key, node, line_of_key in _items(section_node, path, f"section '{section}'"):
            dotted = f"{section}.{key}"
            if dotted in values:
                raise UserError(f"{path}:{line_of_key}: {dotted} stands here twice (first: {values[dotted].where})")
            where = f"{path}:{line_of_key}"
            values[dotted] = Written(_construct(node, where), where)
    return values


def _items(node: Any, path: Path, what: str) -> list[tuple[str, Any, int]]:
    if not isinstance(node, yaml.MappingNode):
        line = node.start_mark.line + 1 if node is not None else 1
        raise UserError(f"{path}:{line}: {what} must be a mapping of keys to values")
    return [(str(key.value), value, key.start_mark.line + 1) for key, value in node.value]


def _construct(node: Any, where: str) -> Any:
    try:
        return _Loader("").construct_object(node, deep=True)
    except _OddYamlError as error:
        raise UserError(f"{where}: {error}") from error
    except (yaml.YAMLError, ValueError) as error:  # an unknown tag; a date that does not exist
        raise UserError(f"{where}: not valid YAML ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    return getattr(error, "problem", None) or first_line(error)
