"""JSON arrays, read record by record."""

from __future__ import annotations

import io
import json
import tracemalloc

import pytest

from ilvr_ds.data.sample import SampleError
from ilvr_ds.errors import UserError
from ilvr_ds.ingest.containers import json_array
from ilvr_ds.ingest.containers.json_array import read_array

RECORDS = [{"id": n, "text": 'Grün 蓝 \\ " ] } ,' * n, "list": [[1], {"a": 2}]} for n in range(12)]


@pytest.mark.parametrize("chunk", [1, 2, 7, 1000])
@pytest.mark.parametrize("indent", [None, 1])
def test_records_are_found_wherever_the_chunks_end(chunk, indent, monkeypatch):
    monkeypatch.setattr(json_array, "_CHUNK", chunk)
    data = b"\xef\xbb\xbf \n" + json.dumps(RECORDS, indent=indent, ensure_ascii=False).encode() + b"\n \n"
    found = list(read_array(io.BytesIO(data), "a.json"))
    assert [entry.record for entry in found] == RECORDS
    assert [entry.number for entry in found] == list(range(1, 13))


@pytest.mark.parametrize("chunk", [1, 1000])
def test_elements_that_are_no_records_are_rejected_one_by_one(chunk, monkeypatch):
    monkeypatch.setattr(json_array, "_CHUNK", chunk)
    found = list(read_array(io.BytesIO(b'[{"a": 1}, 123, {"b": 1, "b": 2}, "x", {"c": 3}]'), "a.json"))
    reasons = [str(entry.record) for entry in found if isinstance(entry.record, SampleError)]
    assert reasons == [
        "expected a JSON object, found a number",
        "the key 'b' stands twice",
        "expected a JSON object, found text",
    ]
    assert found[4].record == {"c": 3}


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b'[{"a": 1}, {"b": }]', "record 2 of the array: not valid JSON"),
        (b'[{"a": 1}, {"b": 2', "record 2 of the array: not valid JSON"),
        (b'[{"a": 1} {"b": 2}]', "record 1 of the array: expected ',', found '{'"),
        (b'[{"a": 1}', "record 1 of the array: expected ',', found the end of the file"),
        (b'[{"a": 1},]', "record 1 of the array: a comma without a record behind it"),
        (b'[{"a": 1}]\n{"b": 2}', "record 1 of the array: text behind the end of the array"),
        (b'[{"a": "\xff"}]', "the text is not UTF-8"),
        (b"[" * 100_000, "record 1 of the array: not valid JSON"),
    ],
)
def test_a_damaged_array_ends_with_the_number_of_the_record(data, what):
    with pytest.raises(UserError) as error:
        list(read_array(io.BytesIO(data), "a.json"))
    assert str(error.value).startswith(f"a.json: {what}")


def test_an_empty_array_has_no_records():
    assert list(read_array(io.BytesIO(b" [ ] "), "a.json")) == []


class Endless(io.RawIOBase):
    """An array of `records` records of about 1 KB, made while it is read."""

    def __init__(self, records: int) -> None:
        self.left, self.pending = records, b"["

    def read(self, size: int = -1) -> bytes:
        while len(self.pending) < size and self.left:
            self.left -= 1
            self.pending += json.dumps({"text": "x" * 1000}).encode() + (b"," if self.left else b"]")
        part, self.pending = self.pending[:size], self.pending[size:]
        return part


def test_memory_does_not_grow_with_the_file(monkeypatch):
    """20 MB in chunks of 64 KB."""
    monkeypatch.setattr(json_array, "_CHUNK", 65536)
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_array(Endless(20_000), "a.json")) == 20_000
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


def test_a_record_above_the_limit_is_refused(monkeypatch):
    monkeypatch.setattr(json_array, "_CHUNK", 100)
    monkeypatch.setattr(json_array, "RECORD_BYTES_LIMIT", 1000)
    with pytest.raises(UserError, match="record 2 of the array: "):
        list(read_array(io.BytesIO(json.dumps([{"a": 1}, {"a": "x" * 100_000}]).encode()), "a.json"))
