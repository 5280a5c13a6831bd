"""`settings`."""

from __future__ import annotations

import argparse

from ilvr_ds.cli.options import Commands, add_command


def add_settings(commands: Commands) -> None:
    """The options of `settings`, of which there are none."""
    command = add_command(
        commands, "settings", "every key of a recipe with its type, default and meaning", "settings.md"
    )
    command.set_defaults(run=_settings)


def _settings(options: argparse.Namespace) -> int:
    from ilvr_ds.config.page import settings_page

    print(settings_page(), end="")
    return 0
