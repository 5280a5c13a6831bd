"""Recognises files that are not JSON Lines: one line says what to do, instead of a rejection for each of theirs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ilvr_ds.errors import UserError

_HEAD = 65536
_MAGIC = {
    b"\x1f\x8b": "is compressed with gzip; unpack it first: gunzip -k {name}",
    b"BZh": "is compressed with bzip2; unpack it first: bunzip2 -k {name}",
    b"\xfd7zXZ\0": "is compressed with xz; unpack it first: unxz -k {name}",
    b"\x28\xb5\x2f\xfd": "is compressed with zstd; unpack it first: unzstd {name}",
    b"PK\x03\x04": "is a ZIP archive; unpack it first: unzip {name}",
    b"PAR1": "is a parquet file; write it as JSON Lines: "
    "python -c \"import datasets; datasets.Dataset.from_parquet('{name}').to_json('{stem}.jsonl')\"",
    b"ARROW1": "is an Arrow file; write it as JSON Lines: "
    "python -c \"import datasets; datasets.Dataset.from_file('{name}').to_json('{stem}.jsonl')\"",
}
_UTF_32 = (b"\xff\xfe\0\0", b"\0\0\xfe\xff")
_UTF_16 = re.compile(rb"\xff\xfe|\xfe\xff|\s?\0[\[{]|[\[{]\0")
_ARRAY = re.compile(rb"(?:\xef\xbb\xbf)?\s*\[\s*[{\]]")
_SPREAD_OBJECT = re.compile(rb"(?:\xef\xbb\xbf)?\s*\{[ \t]*\r?\n")
_CONVERSATIONS = {"conversations": "a LLaVA conversation", "messages": "a chat of messages"}
_SAVED_DATASET = ("state.json", "dataset_info.json", "dataset_dict.json", "*.arrow")
_PLAN = "docs/data.md shows the keys: text_input, image_input, sequence_plan, original_final_answer"


def refuse_foreign(path: Path) -> None:
    """Raise UserError where the first bytes of `path`, or its being a folder, show that it is not JSON Lines in UTF-8.

    A file that cannot be opened is left to the reader.
    """
    if path.is_dir():
        raise UserError(f"{path}: {_folder(path)}")
    if not path.is_file():
        return
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except OSError:
        return
    if found := _content(path, head):
        raise UserError(f"{path}: {found}")


def foreign_record(record: dict[str, Any]) -> str:
    """What a record of another format is and what to do; "" where it is not recognised."""
    for key, name in _CONVERSATIONS.items():
        if isinstance(record.get(key), list):
            return f"the record is {name} ('{key}'), not a question with a plan; {_PLAN}"
    return ""


def _folder(path: Path) -> str:
    if any(next(path.glob(pattern), None) for pattern in _SAVED_DATASET):
        return (
            "is a Hugging Face data set folder; write it as JSON Lines: "
            f"python -c \"import datasets; datasets.load_from_disk('{path}').to_json('{path.name}.jsonl')\""
        )
    if (path / "dataset.json").is_file():
        return "is a data set that `pack` wrote; give it to --shards or data.shards"
    return "is a folder; give the JSON Lines file in it"


def _content(path: Path, head: bytes) -> str:
    names = {"name": str(path), "stem": path.stem}
    for magic, what in _MAGIC.items():
        if head.startswith(magic):
            return what.format(**names)
    if head.startswith(_UTF_32) or _UTF_16.match(head):
        kind = "UTF-32" if head.startswith(_UTF_32) else "UTF-16"
        return f"is text in {kind}, not UTF-8; convert it: iconv -f {kind} -t UTF-8 {path} > {path.stem}.utf8.jsonl"
    if _ARRAY.match(head):
        what = "one JSON array, not one record a line"
        if key := next((key for key in _CONVERSATIONS if b'"%b"' % key.encode() in head), None):
            return f"is {what}, of records of another format ({_CONVERSATIONS[key]}, '{key}'); {_PLAN}"
        return f"is {what}; write it as JSON Lines: jq -c '.[]' {path} > {path.stem}.lines.jsonl"
    if _SPREAD_OBJECT.match(head):
        command = f"jq -c . {path} > {path.stem}.lines.jsonl"
        return f"holds records over several lines, not one a line; convert them: {command}"
    return ""
