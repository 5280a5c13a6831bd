"""Inputs that cannot be read: one line that says what they are, and nothing is written."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path

import pytest

from ilvr_ds.errors import UserError
from ilvr_ds.ingest.importers import Rejected
from ilvr_ds.ingest.pack import pack
from tests.ingest.records import read_records

RECORD = {"text_input": "Why?", "answer": "A"}
LINE = json.dumps(RECORD).encode()


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (bz2.compress(LINE), "compressed with bzip2"),
        (lzma.compress(LINE), "compressed with xz"),
        (b"PK\x03\x04" + LINE, "a ZIP archive"),
        (gzip.compress(LINE, mtime=0)[:-12], "the compressed data are damaged"),
        (gzip.compress(bz2.compress(LINE), mtime=0), "compressed with bzip2"),
        (b"\x28\xb5\x2f\xfd" + LINE, "the compressed data are damaged"),
        (b"PAR1" + bytes(90), "not a readable parquet file"),
        (b"ARROW1" + bytes(90), "an Arrow file"),
        (LINE.decode().encode("utf-16"), "text in UTF-16, not UTF-8; convert it: iconv -f UTF-16"),
        (LINE.decode().encode("utf-16-le"), "text in UTF-16"),
        (LINE.decode().encode("utf-16-be"), "text in UTF-16"),
        (LINE.decode().encode("utf-32"), "text in UTF-32"),
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
        ("state.json", "the `datasets` library cannot read it"),
        ("dataset_dict.json", "the `datasets` library cannot read it"),
        ("dataset.json", "a data set that `pack` wrote"),
        ("other", "the `datasets` library cannot read it"),
    ],
)
def test_a_folder_is_named(tmp_path: Path, name: str, what: str) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / name).touch()
    with pytest.raises(UserError, match=what):
        pack(folder, tmp_path, tmp_path / "out")


def test_json_lines_with_a_byte_order_mark_or_blank_lines_are_read(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + LINE + b"\n\n" + LINE + b"\n")
    assert not [record for record in read_records(file, tmp_path) if isinstance(record, Rejected)]
