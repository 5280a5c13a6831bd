"""Names of metrics and addresses of stores, as MLflow takes them: kinds of task and paths are free text."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from urllib.parse import unquote

LONGEST = 250
"""Characters of a name that MLflow takes."""
_REFUSED = re.compile(r"[^\w\-. :]")
"""MLflow takes letters and digits of every script, these marks, and "/", which parts names into groups."""
_SQLITE, _WITH_DRIVER = "sqlite:///", "sqlite+pysqlite:///"
"""Names of the same store. MLflow makes the folder of an address of the first kind, as it is written: of a path that is
written otherwise than it is, that would be another folder."""


def metric_name(prefix: str, kind: str) -> str:
    """`prefix`/`kind`; a kind that MLflow refuses is rewritten, with a piece of its sha256, so that none share a name.

    A kind has the same name whatever kinds are beside it.
    """
    plain = _REFUSED.sub("_", kind)
    whole = f"{prefix}/{plain}"
    if plain == kind and kind not in ("", ".", "..") and len(whole) <= LONGEST:
        return whole
    piece = f"-{hashlib.sha256(kind.encode()).hexdigest()[:8]}"
    return f"{prefix}/{plain or 'none'}"[: LONGEST - len(piece)] + piece


def sqlite_uri(file: Path) -> str:
    """The address of a SQLite file; `%` and `?` of its path are written as SQLAlchemy reads them."""
    path = str(file.absolute())
    written = path.replace("%", "%25").replace("?", "%3F")
    return f"{_SQLITE if written == path else _WITH_DRIVER}{written}"


def sqlite_path(uri: str) -> Path | None:
    """The file behind the address of a SQLite store, absolute; None for other addresses."""
    for start in (_SQLITE, _WITH_DRIVER):
        if uri.startswith(start):
            return Path(unquote(uri.removeprefix(start).partition("?")[0])).absolute()
    return None
