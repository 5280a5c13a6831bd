"""Lines that are no record."""

from pathlib import Path

from tests.data.packing import write_jsonl
from tests.ingest.records import read_records


def test_a_key_that_stands_twice_is_rejected(tmp_path: Path) -> None:
    """JSON readers take the last and say nothing."""
    source = write_jsonl(tmp_path / "a.jsonl", [b'{"text_input": "a", "answer": "A", "answer": "B"}'])
    [rejected] = read_records(source, tmp_path, "mirage")
    assert rejected.reason == "the key 'answer' stands twice"
