"""Recipes and DeepSpeed settings that come with the package, by name: `--config comt_7b`, `deepspeed.config: zero2`."""

from __future__ import annotations

from pathlib import Path

from ilvr_ds.errors import UserError, nearest

_PACKAGE = Path(__file__).resolve().parent


def recipes() -> dict[str, Path]:
    """The recipes by name: `launch/recipes` of a checkout, `recipes` of an installed package."""
    return _named("launch/recipes", "*.yaml")


def deepspeed_files() -> dict[str, Path]:
    """The DeepSpeed settings by name: `ds_configs` of a checkout or of an installed package."""
    return _named("ds_configs", "*.json")


def find_recipe(wanted: Path) -> Path:
    """The path of a recipe: `wanted` itself, or that of the shipped recipe with this name. Raises UserError."""
    if wanted.is_file() or not is_name(str(wanted)):
        return wanted
    found = recipes()
    if wanted.name not in found:
        hint = nearest(wanted.name, found)
        raise UserError(f"--config {wanted}: neither a file nor the name of a recipe{hint}")
    return found[wanted.name]


def is_name(text: str) -> bool:
    """Whether it can be a name: no folder and no suffix."""
    return Path(text).name == text and not Path(text).suffix


def _named(folder: str, pattern: str) -> dict[str, Path]:
    for place in (_PACKAGE.parent / folder, _PACKAGE / Path(folder).name):
        if found := sorted(place.glob(pattern)):
            return {path.stem: path for path in found}
    return {}
