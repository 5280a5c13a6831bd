from __future__ import annotations

import pytest

from ilvr_ds.monitoring.target_watch import INTERVALS, TargetWatch


def test_targets_that_stay_alike_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    watch = TargetWatch()
    for _ in range(INTERVALS - 1):
        watch({"select/target_similarity": 0.95})
    watch({"select/target_similarity": 0.85})
    watch({})
    assert not caplog.records, "not in a row"
    for _ in range(2 * INTERVALS):
        watch({"select/target_similarity": 0.95})
    [record] = caplog.records
    assert f"above 0.9 at {INTERVALS} log lines in a row" in record.getMessage()


def test_pictures_without_change_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    watch = TargetWatch()
    for share in (0.0, 0.25, 0.5):
        watch({"select/unchanged": share})
    [record] = caplog.records
    assert record.getMessage().startswith("in 25.0 % of the segments no part of the helper image differs")
