"""What an audit is asked for."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, get_args

import yaml

from ilvr_ds.config import REQUIRED, Recipe, SelectionConfig, recipe_from_dict
from ilvr_ds.errors import UserError, nearest
from ilvr_ds.evaluation.preparation import EvaluationSettings
from ilvr_ds.generation.row_modes import Barred
from ilvr_ds.tracking.registry import read_origin

TESTS = ("replacement", "donor", "inside", "barred")
REPLACEMENTS = (
    "zeros", "noise", "first_repeated", "other_sample", "same_group", "pad_embedding", "true", "markers", "skipped",
    "half_slots",
)  # fmt: skip
BARRED: tuple[Barred, ...] = get_args(Barred)


@dataclass(frozen=True)
class AuditSettings:
    """An evaluation's settings, which tests, and how targets are selected where it is not as the model says."""

    evaluation: EvaluationSettings
    tests: tuple[str, ...] = TESTS
    overrides: tuple[str, ...] = ()
    """selection.KEY=VALUE, as on the command line"""


def parse_tests(text: str) -> tuple[str, ...]:
    """The tests that a list with commas names, in the order of TESTS; raises UserError."""
    wanted = [name.strip() for name in text.split(",")]
    for name in wanted:
        if name not in TESTS:
            raise UserError(f"--tests: '{name}' is unknown{nearest(name, TESTS)}; valid: {', '.join(TESTS)}")
    return tuple(name for name in TESTS if name in wanted)


def selection_of(model: str, latent_size: int, overrides: tuple[str, ...]) -> tuple[SelectionConfig, str]:
    """How the model's targets are selected, and where that is known from.

    model: its folder. Raises UserError for an override that no recipe would take.
    """
    noted = read_origin(model).get("selection") or {}
    known = {field.name for field in fields(SelectionConfig)}
    values: dict[str, Any] = {key: value for key, value in noted.items() if key in known}
    source = "the model's training run" if noted else "defaults, for the model does not say how it was trained"
    for text in overrides:
        key, separator, value = text.partition("=")
        section, _, name = key.partition(".")
        if section != "selection" or not separator:
            raise UserError(f"--set {text}: expected a key of selection, as in selection.pool=changed")
        try:
            values[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(f"--set {text}: the value is not valid YAML") from error
        source += f"; {text}"
    required = [key.split(".") for key, value in Recipe().flat().items() if value == REQUIRED]
    sections: dict[str, dict[str, Any]] = {"model": {"latent_size": latent_size}, "selection": values}
    for section, name in required:
        sections.setdefault(section, {})[name] = "audit"
    try:
        return recipe_from_dict(sections).selection, source
    except UserError as error:
        raise UserError(f"--set: {error}") from error
