"""The families of models that can be trained, a module each; family.py says what a family must say."""

from __future__ import annotations

from typing import Any

from ilvr_ds.errors import UserError, nearest
from ilvr_ds.model.families.family import Family
from ilvr_ds.model.families.qwen2_5_vl import Qwen25VL
from ilvr_ds.model.families.qwen3_vl import Qwen3VL

__all__ = ["FAMILIES", "Family", "family_named", "family_of"]

FAMILIES: tuple[Family, ...] = (Qwen25VL(), Qwen3VL())


def family_named(name: str) -> Family:
    """The family of a `model_type`; raises UserError for an unknown one."""
    for family in FAMILIES:
        if family.name == name:
            return family
    raise UserError(f"no family of models '{name}'{nearest(name, (family.name for family in FAMILIES))}")


def family_of(config: Any) -> Family:
    """The family of a transformers configuration that `load_config` accepted, of a whole model or a part.

    Raises StopIteration for others.
    """
    name = config.model_type.removesuffix("_text").removesuffix("_vision")
    return next(family for family in FAMILIES if family.name == name)
