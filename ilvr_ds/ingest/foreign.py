"""Recognises inputs that cannot be read: one line says what to do, instead of a rejection for each line."""

from __future__ import annotations

import re
from pathlib import Path

from ilvr_ds.errors import UserError

HEAD = 65536
"""Bytes of a file that show what it is."""
_MAGIC = {
    b"BZh": "is compressed with bzip2; unpack it first: bunzip2 -k {name}",
    b"\xfd7zXZ\0": "is compressed with xz; unpack it first: unxz -k {name}",
    b"PK\x03\x04": "is a ZIP archive; unpack it first: unzip {name}",
    b"ARROW1": "is an Arrow file; write it as JSON Lines: "
    "python -c \"import datasets; datasets.Dataset.from_file('{name}').to_json('{stem}.jsonl')\"",
}
_UTF_32 = (b"\xff\xfe\0\0", b"\0\0\xfe\xff")
_UTF_16 = re.compile(rb"\xff\xfe|\xfe\xff|\s?\0[\[{]|[\[{]\0")
_ARRAY = re.compile(rb"(?:\xef\xbb\xbf)?\s*\[\s*[{\]]")
_SPREAD_OBJECT = re.compile(rb"(?:\xef\xbb\xbf)?\s*\{[ \t]*\r?\n")
_PACKED = "dataset.json"


def refuse_folder(path: Path) -> None:
    """Raise UserError where a folder holds what `pack` wrote."""
    if (path / _PACKED).is_file():
        raise UserError(f"{path}: is a data set that `pack` wrote; give it to --shards or data.shards")


def refuse_content(path: Path, head: bytes) -> None:
    """Raise UserError where the first bytes of a file show that it is no text in UTF-8 with a record a line."""
    if found := _content(path, head):
        raise UserError(f"{path}: {found}")


def is_array(head: bytes) -> bool:
    """Whether a file that begins so is a JSON array of objects."""
    return bool(_ARRAY.match(head))


def _content(path: Path, head: bytes) -> str:
    names = {"name": str(path), "stem": path.stem}
    for magic, what in _MAGIC.items():
        if head.startswith(magic):
            return what.format(**names)
    if head.startswith(_UTF_32) or _UTF_16.match(head):
        kind = "UTF-32" if head.startswith(_UTF_32) else "UTF-16"
        return f"is text in {kind}, not UTF-8; convert it: iconv -f {kind} -t UTF-8 {path} > {path.stem}.utf8.jsonl"
    if _SPREAD_OBJECT.match(head):
        command = f"jq -c . {path} > {path.stem}.lines.jsonl"
        return f"holds records over several lines, not one a line; convert them: {command}"
    return ""
