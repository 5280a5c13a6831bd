"""Metric names and store addresses that MLflow accepts, made from free text: kinds of task and paths."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from urllib.parse import unquote

LONGEST = 250
"""Characters in a name, at most, for MLflow."""
_REFUSED = re.compile(r"[^\w\-. :]")
"""MLflow accepts letters and digits of every script, these marks, and "/", which groups names."""
_SQLITE, _WITH_DRIVER = "sqlite:///", "sqlite+pysqlite:///"
"""Two spellings of the same store. For the first, MLflow creates the folder exactly as written, so a path that needs
escapes would become another folder."""


def metric_name(prefix: str, kind: str) -> str:
    """`prefix`/`kind`; a kind that MLflow refuses is rewritten, with a piece of its sha256 to keep names distinct.

    The name of a kind does not depend on the other kinds.
    """
    plain = _REFUSED.sub("_", kind)
    whole = f"{prefix}/{plain}"
    if plain == kind and kind not in ("", ".", "..") and len(whole) <= LONGEST:
        return whole
    piece = f"-{hashlib.sha256(kind.encode()).hexdigest()[:8]}"
    return f"{prefix}/{plain or 'none'}"[: LONGEST - len(piece)] + piece


def sqlite_uri(file: Path) -> str:
    """The address of a SQLite file; `%` and `?` in its path are escaped for SQLAlchemy."""
    path = str(file.absolute())
    written = path.replace("%", "%25").replace("?", "%3F")
    return f"{_SQLITE if written == path else _WITH_DRIVER}{written}"


def sqlite_path(uri: str) -> Path | None:
    """The absolute path of the file behind a SQLite address; None for other addresses."""
    for start in (_SQLITE, _WITH_DRIVER):
        if uri.startswith(start):
            return Path(unquote(uri.removeprefix(start).partition("?")[0])).absolute()
    return None


def absolute(uri: str) -> str:
    """The address, with the path of a SQLite file absolute: the next command may run in another folder."""
    path = sqlite_path(uri)
    if path is None or uri.startswith((f"{_SQLITE}/", f"{_WITH_DRIVER}/")):
        return uri
    _, mark, options = uri.partition("?")
    return f"{sqlite_uri(path)}{mark}{options}"


def without_password(uri: str) -> str:
    """The address without credentials, fit for logs and files."""
    return uri if sqlite_path(uri) else re.sub(r"//[^/@]*@", "//", uri)
