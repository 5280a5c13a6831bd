"""The one exception for mistakes that a user can make and mend."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in a recipe, a data set, a path or an argument.

    The message is one line: where (file, line or key), what is wrong, what to do.
    The command line prints it without a traceback and leaves with exit code 2.
    """


def nearest(name: str, valid: Iterable[str]) -> str:
    """A hint for a misspelt `name`: "; did you mean 'x'?" or the list of valid names."""
    options = sorted(valid)
    close = difflib.get_close_matches(name, options, n=1)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; valid: {', '.join(options)}" if options else ""
