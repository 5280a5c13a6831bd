"""Completion in a shell: `eval "$(register-python-argcomplete ilvr-ds)"` switches it on."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator

from ilvr_ds import shipped
from ilvr_ds.config import Recipe


def complete_if_asked(parser: argparse.ArgumentParser) -> None:
    """Where a shell asks for completions: print them and end the process."""
    if "_ARGCOMPLETE" not in os.environ:
        return
    import argcomplete

    for action in _actions(parser):
        if action.dest == "set":
            action.completer = lambda **_: [f"{key}=" for key in Recipe().flat()]  # type: ignore[attr-defined]
        elif action.dest == "config":
            files = argcomplete.completers.FilesCompleter(["yaml"])
            action.completer = lambda files=files, **asked: [*shipped.recipes(), *files(**asked)]  # type: ignore[attr-defined]
        elif action.dest == "card":
            action.completer = lambda **_: _cards()  # type: ignore[attr-defined]
    argcomplete.autocomplete(parser)


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Of all commands."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)
        else:
            yield action


def _cards() -> list[str]:
    from ilvr_ds.planning.chips import CARDS

    return list(CARDS)
