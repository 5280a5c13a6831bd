from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from ilvr_ds.tracking.record import Record, read_record, summary_lines
from tests.full_disk import files_end_at


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def lines(path: Path, offset: int = 0) -> list[dict[str, Any]]:
    return [line for line, _ in read_record(path, offset)]


def test_a_line_is_in_the_file_when_the_call_returns(path: Path) -> None:
    record = Record(path)
    record.metrics(3, {"loss/ce": 0.5})
    record.event("checkpoint", step=3)
    first, second = lines(path)
    assert (first["step"], first["metrics"]) == (3, {"loss/ce": 0.5})
    assert (second["event"], second["step"]) == ("checkpoint", 3)
    assert first["time"] <= second["time"]


def test_numbers_that_json_lacks_are_words(path: Path) -> None:
    Record(path).metrics(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1e-300})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    found = json.loads(path.read_text(), parse_constant=refuse)["metrics"]
    assert found == {"a": "nan", "b": "inf", "c": "-inf", "d": 1e-300}


def test_a_record_goes_on_behind_what_is_there(path: Path) -> None:
    for step in range(2):
        record = Record(path)
        record.metrics(step, {})
        record.close()
    assert [line["step"] for line in lines(path)] == [0, 1]


@pytest.mark.parametrize("torn", [b'{"step": 2, "metr', b"{", b'{"event": "\xc3'])
def test_a_torn_last_line_is_dropped_with_a_warning(path: Path, torn: bytes, caplog: pytest.LogCaptureFixture) -> None:
    whole = b'{"step": 1, "metrics": {}}\n'
    path.write_bytes(whole + torn)
    Record(path).metrics(2, {})
    assert path.read_bytes().startswith(whole)
    assert [line["step"] for line in lines(path)] == [1, 2]
    assert f"dropped an unfinished last line of {len(torn)} bytes" in caplog.text


def test_a_file_that_is_one_torn_line_starts_anew(path: Path) -> None:
    path.write_bytes(b'{"step"')
    Record(path).metrics(1, {})
    assert [line["step"] for line in lines(path)] == [1]


def test_a_whole_file_is_left_as_it_is(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path.write_bytes(b'{"step": 1}\n')
    Record(path).close()
    assert path.read_bytes() == b'{"step": 1}\n' and not caplog.records


def test_reading_from_the_offset_behind_a_line_gives_the_next(path: Path) -> None:
    record = Record(path)
    for step in range(4):
        record.event("größer", step=step)
    offsets = [offset for _, offset in read_record(path)]
    assert offsets[-1] == path.stat().st_size
    for seen, offset in enumerate([0, *offsets]):
        assert [line["step"] for line in lines(path, offset)] == list(range(seen, 4))


def test_a_line_still_being_written_is_read_when_it_is_whole(path: Path) -> None:
    path.write_bytes(b'{"step": 1}\n{"step": ')
    [(first, offset)] = read_record(path)
    assert first == {"step": 1}
    with path.open("ab") as file:
        file.write(b"2}\n")
    assert lines(path, offset) == [{"step": 2}]


def test_the_summary_tells_first_and_last_training_and_last_evaluation(path: Path) -> None:
    record = Record(path)
    record.metrics(10, {"loss/ce": 3.0, "loss/total": 9.0, "teacher/drift": math.nan})
    record.event("checkpoint", step=10)
    record.metrics(10, {"eval/ce": 2.0})
    record.metrics(20, {"loss/ce": 1.25, "teacher/drift": 0.5})
    record.metrics(20, {"eval/ce": 1.0})
    assert [" ".join(line.split()) for line in summary_lines(path)] == [
        "loss/ce 3.0000 (step 10) -> 1.2500 (step 20)",
        "teacher/drift nan (step 10) -> 0.5000 (step 20)",
        "eval/ce 1.0000 on held-out samples",
    ]


def test_the_summary_of_a_run_without_metrics_is_empty(path: Path) -> None:
    Record(path).event("end", status="FAILED")
    assert summary_lines(path) == []


def test_a_full_disk_costs_no_line_and_no_run(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches a run that ends for its record, lines that are lost, and a line that is written in two halves."""
    record = Record(path)
    record.metrics(1, {"loss/ce": 0.5})
    with files_end_at(path.stat().st_size + 30):  # the next line fits in part
        for step in (2, 3):
            record.metrics(step, {"loss/ce": 0.5})
            assert [line["step"] for line in lines(path)] == [1]
    record.metrics(4, {"loss/ce": 0.5})
    record.close()
    assert [line["step"] for line in lines(path) if "metrics" in line] == [1, 2, 3, 4]
    [waited] = [line for line in lines(path) if line.get("event") == "record_waited"]
    assert waited["lines"] == 2
    assert caplog.text.count("training goes on") == 1 and "File too large" in caplog.text
    assert "2 waiting lines are written" in caplog.text


def test_what_a_full_disk_took_is_counted_at_the_end(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    record = Record(path)
    record.metrics(1, {})
    with files_end_at(path.stat().st_size):
        record.metrics(2, {})
        record.event("end", status="FINISHED")
        record.close()
    assert [line["step"] for line in lines(path)] == [1]
    assert f"{path}: 2 lines could not be written and are lost" in caplog.text


def test_lines_that_wait_are_not_lost_with_the_last_call(path: Path) -> None:
    record = Record(path)
    record.metrics(1, {})
    with files_end_at(path.stat().st_size):
        record.metrics(2, {})
    record.close()
    assert [line["step"] for line in lines(path) if "metrics" in line] == [1, 2]
