"""Files that are not JSON Lines: one line that says what they are, before anything is read or written."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pytest

from ilvr_ds.errors import UserError
from ilvr_ds.ingest.importers import Rejected, read_records
from ilvr_ds.ingest.pack import pack
from tests.data.packing import write_jsonl

RECORD = {"text_input": "Why?", "answer": "A"}
LINE = json.dumps(RECORD).encode()
CHAT: dict[str, Any] = {"id": "1", "image": "a.png", "conversations": [{"from": "human", "value": "<image>Why?"}]}


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (gzip.compress(LINE), "compressed with gzip; unpack it first: gunzip -k"),
        (bz2.compress(LINE), "compressed with bzip2"),
        (lzma.compress(LINE), "compressed with xz"),
        (b"\x28\xb5\x2f\xfd" + LINE, "compressed with zstd"),
        (b"PK\x03\x04" + LINE, "a ZIP archive"),
        (b"PAR1" + bytes(90), "a parquet file; write it as JSON Lines: python -c"),
        (b"ARROW1" + bytes(90), "an Arrow file"),
        (LINE.decode().encode("utf-16"), "text in UTF-16, not UTF-8; convert it: iconv -f UTF-16"),
        (LINE.decode().encode("utf-16-le"), "text in UTF-16"),
        (LINE.decode().encode("utf-16-be"), "text in UTF-16"),
        (LINE.decode().encode("utf-32"), "text in UTF-32"),
        (json.dumps([RECORD], indent=2).encode(), "one JSON array, not one record a line; write it as JSON Lines: jq"),
        (json.dumps([RECORD]).encode(), "one JSON array"),
        (b"[]", "one JSON array"),
        (json.dumps([CHAT], indent=2).encode(), r"one JSON array.* of another format \(a LLaVA conversation"),
        (json.dumps(RECORD, indent=2).encode(), "holds records over several lines, not one a line; .*: jq -c"),
    ],
)
def test_a_file_that_is_something_else_is_named(tmp_path: Path, content: bytes, what: str) -> None:
    file = tmp_path / "train.jsonl"
    file.write_bytes(content)
    for act in (lambda: pack(file, tmp_path, tmp_path / "out"), lambda: list(read_records(file, tmp_path))):
        with pytest.raises(UserError, match=rf"^{file}: .*{what}") as error:
            act()
        assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("state.json", "a Hugging Face data set folder; .*load_from_disk"),
        ("dataset_dict.json", "a Hugging Face data set folder"),
        ("data-00000-of-00001.arrow", "a Hugging Face data set folder"),
        ("dataset.json", "a data set that `pack` wrote"),
        ("other", "is a folder; give the JSON Lines file in it"),
    ],
)
def test_a_folder_is_named(tmp_path: Path, name: str, what: str) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / name).touch()
    with pytest.raises(UserError, match=what):
        pack(folder, tmp_path, tmp_path / "out")


@pytest.mark.parametrize(
    ("record", "what"),
    [
        (CHAT, "a LLaVA conversation"),
        ({"messages": [{"role": "user", "content": "Why?"}]}, "a chat of messages"),
    ],
)
def test_records_of_another_format_are_named(tmp_path: Path, record: dict[str, Any], what: str) -> None:
    file = write_jsonl(tmp_path / "train.jsonl", [record])
    with pytest.raises(UserError, match=rf"train\.jsonl:1: the record is {what} .*docs/data\.md shows the keys"):
        pack(file, tmp_path, tmp_path / "out")


def test_json_lines_with_a_byte_order_mark_or_blank_lines_are_read(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + LINE + b"\n\n" + LINE + b"\n")
    assert not [record for record in read_records(file, tmp_path) if isinstance(record, Rejected)]
