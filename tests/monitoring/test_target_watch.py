from __future__ import annotations

from typing import Literal

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


@pytest.mark.parametrize(
    ("unchanged", "become"),
    [("query", "they are selected over all patches, by the query"), ("none", "they have no target")],
)
def test_pictures_without_change_are_told_once(
    unchanged: Literal["query", "none"], become: str, caplog: pytest.LogCaptureFixture
) -> None:
    watch = TargetWatch(unchanged)
    for share in (0.0, 0.25, 0.5):
        watch({"select/unchanged": share})
    [record] = caplog.records
    assert record.getMessage().startswith("in 25.0 % of the segments no part of the helper image differs")
    assert record.getMessage().endswith(f"(or there is none): {become} (select/unchanged)")
