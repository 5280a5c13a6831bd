"""Addresses of SQLite stores: a path on its way into an address and out again."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote

_SQLITE, _WITH_DRIVER = "sqlite:///", "sqlite+pysqlite:///"
"""Names of the same store. MLflow makes the folder of an address of the first kind, as it is written: of a path that is
written otherwise than it is, that would be another folder."""


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
