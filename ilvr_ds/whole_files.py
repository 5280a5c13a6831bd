"""Files, and last lines, that are there as a whole or not at all, also where several processes write the same file."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def partial_name(path: Path) -> Path:
    """A name beside `path` that no other process takes. Process ids would not do: hosts share them."""
    return path.with_name(f"{path.name}.partial-{secrets.token_hex(4)}")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file to write, which takes the name `path` at the end of the block, and is removed where the block fails."""
    partial = partial_name(path)
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)  # on a full disk every retry would leave one


def write_whole(path: Path, text: str) -> None:
    """Write a text file."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def cut_torn_line(path: Path) -> int:
    """Cut off a last line without an end, which a process leaves that was killed while it wrote; returns its bytes."""
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        with path.open("r+b") as file:
            file.truncate(whole)
    return len(data) - whole
