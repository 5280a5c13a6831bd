"""Exceptions whose message is one line; two of them end a command."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def in_one_line(text: str) -> str:
    """The text, its unprintable characters escaped."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


class OneLineError(Exception):
    """An exception whose text is one line, whatever it quotes: unprintable characters are escaped.

    Messages quote files, keys and values that nobody has checked: a line feed would break a log, a lone surrogate would
    break printing.
    """

    def __str__(self) -> str:
        return in_one_line(super().__str__())


class UserError(OneLineError):
    """A mistake in a recipe, a data set, a path or an argument.

    The message is one line: where (file, line or key), what is wrong, what to do.
    The command line prints it without a traceback and exits with code 2.
    """


class RunError(OneLineError):
    """A run cannot go on, and no setting is to blame: a rank is lost, memory runs out, gradients stay infinite.

    The message is one line with rank, step and samples. The command line prints it last and exits with code 1.
    """


def counted(number: int, noun: str) -> str:
    """ "1 rank", "2 ranks"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def first_line(error: BaseException) -> str:
    """What an exception of a library says first; its type where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def nearest(name: str, valid: Iterable[str]) -> str:
    """A hint for a misspelt `name`: "; did you mean 'x'?", else the list of valid names."""
    options = sorted(valid)
    close = difflib.get_close_matches(name, options, n=1)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; valid: {', '.join(options)}" if options else ""
