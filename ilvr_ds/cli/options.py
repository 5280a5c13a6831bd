"""Options that several commands have."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TypeAlias

from ilvr_ds.config import LIMITS, Recipe, load_recipe
from ilvr_ds.errors import UserError

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_command(commands: Commands, name: str, about: str, page: str) -> argparse.ArgumentParser:
    """The parser of a command. about: what it does, in a line; page: the file in docs that explains it."""
    said = f"{about[0].upper()}{about[1:]}."
    return commands.add_parser(name, help=about, description=said, epilog=f"More: docs/{page}")


def add_recipe(command: argparse.ArgumentParser, purpose: str, required: bool = False) -> None:
    """`--config` and `--set`; a recipe may be named, `main` makes a path of the name."""
    command.add_argument("--config", type=Path, required=required, help=purpose)
    command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the recipe")


def recipe_of(options: argparse.Namespace) -> Recipe:
    """The recipe with its overrides. Raises UserError."""
    return load_recipe(options.config, options.set)


def recipe_if_given(options: argparse.Namespace) -> Recipe | None:
    """The same where `--config` may be left out. Raises UserError for overrides of nothing."""
    if options.set and not options.config:
        raise UserError(f"--set {options.set[0]}: overrides a key of a recipe; give one by --config")
    return recipe_of(options) if options.config else None


def check_max_image_pixels(options: argparse.Namespace) -> None:
    """Raise UserError unless `--max-image-pixels` is left out or what a recipe allows."""
    least, most = LIMITS["data.max_image_pixels"]
    if options.max_image_pixels is not None and not least <= options.max_image_pixels <= most:
        raise UserError(f"--max-image-pixels {options.max_image_pixels}: must be from {least} to {most}")
