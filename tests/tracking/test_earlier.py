"""Runs that go on, start over, or go back to an older step."""

from __future__ import annotations

import json
from pathlib import Path

from ilvr_ds.tracking.record import read_record
from tests.tracking.trackers import START_S, client, draw, history, log, recorded, runs_of, start, stored_pictures


def test_a_run_that_goes_on_is_the_same_run_without_double_points(folder: Path) -> None:
    first = start(folder)
    log(first, range(1, 6))
    first.close("KILLED", START_S)
    second = start(folder)
    log(second, range(4, 9), value=0.75)  # steps 4 and 5 are trained again from an older checkpoint
    assert second.close("FINISHED", START_S) == 0
    [run] = runs_of(folder)
    assert run.info.run_id == first.run_id == second.run_id and run.info.status == "FINISHED"
    assert history(folder, "loss/ce") == [(n, n + (0.5 if n < 6 else 0.75)) for n in range(1, 9)]
    assert len([line for line in recorded(folder) if "metrics" in line]) == 10, "the record holds everything"


def test_a_run_from_the_start_leaves_the_earlier_try_alone(folder: Path) -> None:
    first = start(folder)
    log(first, range(1, 3))
    first.close("FAILED", START_S)
    second = start(folder, goes_on=False)
    log(second, range(1, 2), value=0.25)
    assert second.close("FINISHED", START_S) == 0
    assert len(runs_of(folder)) == 2 and first.run_id != second.run_id
    assert [line["step"] for line in recorded(folder) if "metrics" in line] == [1]
    assert [line["step"] for line, _ in read_record(folder / "metrics.1.jsonl") if "metrics" in line] == [1, 2]


def test_a_run_from_the_start_keeps_an_earlier_record_apart(folder: Path) -> None:
    """Catches points of two runs in one curve, and new points that are dropped because old steps were sent."""
    for value in (0.5, 0.25):
        tracker = start(folder, goes_on=False)
        log(tracker, range(1, 3), value)
        assert tracker.close("FINISHED", START_S) == 0
    assert len(runs_of(folder)) == 2
    assert [line["metrics"]["loss/ce"] for line in recorded(folder) if "metrics" in line] == [1.25, 2.25]
    assert (folder / "metrics.1.jsonl").exists()


def test_the_run_above_is_known_at_the_first_start_alone(folder: Path) -> None:
    """Catches a second stage that goes on, and is no child of the first any more."""
    tracker = start(folder, "http://127.0.0.1:9", tags={"mlflow.parentRunId": "abc", "host": "a"})
    tracker.close("KILLED", 0)
    tracker = start(folder, "http://127.0.0.1:9", tags={"host": "b"}, goes_on=True)
    tracker.close("KILLED", 0)
    tags = json.loads((folder / "mlflow.json").read_text())["tags"]
    assert tags == {"mlflow.parentRunId": "abc", "host": "b"}


def test_going_back_is_a_run_of_its_own_that_begins_with_the_common_steps(folder: Path) -> None:
    """Catches curves that show the way that was left, for MLflow drops new points of old steps and deletes none."""
    first = start(folder, tags={"mlflow.parentRunId": "abc", "host": "a"})
    for step in (2, 5):
        draw(folder, f"a-{step}.png")
        first.picture(step, "curves", f"a-{step}.png", 0.1)
    log(first, range(1, 6))
    assert first.close("KILLED", START_S) == 0
    found = client(folder.parent)
    found.update_run(first.run_id, status="RUNNING")  # as kill -9 leaves it

    for value in (0.75, 0.25):  # the second start is a requeue before anything was saved: the same way
        second = start(folder, **({"back_to": 2} if value == 0.75 else {}), run_id=first.run_id)
        log(second, range(3, 5), value)
        assert second.close("FINISHED", START_S) == 0
    assert [step for step, _ in history(folder, "loss/ce")] == [1, 2, 3, 4]
    assert history(folder, "loss/ce") == [(1, 1.5), (2, 2.5), (3, 3.75), (4, 4.75)]
    assert stored_pictures(folder) == ["images/curves+step+2"]
    assert [p.name for p in (folder / "pictures").iterdir()] == ["a-2.png"]
    tags = found.get_run(second.run_id).data.tags
    assert (tags["ilvr_ds.went_back_from"], tags["mlflow.parentRunId"]) == (first.run_id, "abc")
    left = found.get_run(first.run_id)
    assert left.info.run_name == f"{folder.name} (left after step 2)" and left.info.status == "KILLED"
    assert left.data.tags["ilvr_ds.left_for"] == second.run_id
    assert [m.step for m in found.get_metric_history(first.run_id, "loss/ce")] == [1, 2, 3, 4, 5]
    assert [line["step"] for line, _ in read_record(folder / "metrics.1.jsonl") if "metrics" in line] == [1, 2, 3, 4, 5]


def test_going_back_to_where_the_record_ends_leaves_nothing(folder: Path) -> None:
    first = start(folder)
    log(first, range(1, 3))
    assert first.close("KILLED", START_S) == 0
    second = start(folder, back_to=2)
    log(second, range(3, 5))
    assert second.close("FINISHED", START_S) == 0
    assert second.run_id == first.run_id and not (folder / "metrics.1.jsonl").exists()


def test_going_back_behind_what_no_server_has_seen(folder: Path) -> None:
    first = start(folder, "http://127.0.0.1:9")
    log(first, range(1, 6))
    first.close("KILLED", 0)
    second = start(folder, back_to=2)
    log(second, range(3, 5), 0.75)
    assert second.close("FINISHED", START_S) == 0
    assert history(folder, "loss/ce") == [(1, 1.5), (2, 2.5), (3, 3.75), (4, 4.75)]
