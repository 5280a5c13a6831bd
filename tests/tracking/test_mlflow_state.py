"""What a run knows of its copy, on disk; the copy itself is tested through the tracker."""

from __future__ import annotations

from pathlib import Path

import pytest

from ilvr_ds.tracking.mlflow_state import CopyState, LeftRun, read_state, write_state
from tests.full_disk import files_end_at


def test_what_is_written_is_read(tmp_path: Path) -> None:
    state = CopyState(uri="http://host", tags={"a": "b"}, left=LeftRun("abc", 7), last_steps={"loss/ce": 3})
    write_state(tmp_path / "mlflow.json", state)
    assert read_state(tmp_path / "mlflow.json") == state


def test_a_full_disk_leaves_the_state_of_before_and_nothing_else(tmp_path: Path) -> None:
    """Catches a file left over by every attempt."""
    before = CopyState(uri="http://host")
    write_state(tmp_path / "mlflow.json", before)
    with files_end_at(10), pytest.raises(OSError, match="File too large"):
        write_state(tmp_path / "mlflow.json", CopyState(uri="http://other"))
    assert read_state(tmp_path / "mlflow.json") == before
    assert [path.name for path in tmp_path.iterdir()] == ["mlflow.json"]
