"""What `doctor --cluster` concludes from the findings of all ranks."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from ilvr_ds import cli
from ilvr_ds.cluster import Findings, compare
from ilvr_ds.doctor import Check
from tests.ranks import run_ranks

GOOD = Findings(0, "h1", "cpu", {"torch": "2.11", "code": "abc"}, 100.0, 16.0, 1000.0, 200.0, "")


def checks(*changes: dict[str, object]) -> dict[str, Check]:
    """Over four ranks on two hosts, the last of which are changed."""
    ranks = [dataclasses.replace(GOOD, rank=rank, host=f"h{1 + rank // 2}") for rank in range(4)]
    for place, change in enumerate(changes, start=4 - len(changes)):
        ranks[place] = dataclasses.replace(ranks[place], **change)  # type: ignore[arg-type]
    return {check.name: check for check in compare(ranks)}


def test_equal_ranks_are_fine() -> None:
    assert {check.status for check in checks().values()} == {"ok"}
    assert checks()["ranks"].detail == "4 on 2 hosts"


@pytest.mark.parametrize("key", ["torch", "code"])
def test_the_odd_one_out_is_named(key: str) -> None:
    """Hosts with different code or versions train nonsense, or wait for each other."""
    check = checks({"same": {**GOOD.same, key: "other"}})[key]
    assert check.status == "bad" and check.detail == f"{GOOD.same[key]}; rank 3 on h2: other"


def test_a_package_that_no_host_has_is_left_out() -> None:
    same = {**GOOD.same, "flash-attn-4": "none"}
    ranks = [dataclasses.replace(GOOD, rank=rank, same=same) for rank in range(2)]
    assert "flash-attn-4" not in {check.name for check in compare(ranks)}
    ranks[1] = dataclasses.replace(ranks[1], same={**same, "flash-attn-4": "4.0.0"})
    [check] = [check for check in compare(ranks) if check.name == "flash-attn-4"]
    assert check.status == "bad"


def test_shards_that_one_host_cannot_read_break_the_run() -> None:
    check = checks({"unreadable": "no such folder", "read_mib_s": None})["shards"]
    assert check.status == "bad" and check.detail == "rank 3 on h2: no such folder"


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"free_disk_gib": 3.0}, "disk"),
        ({"shared_memory_gib": 0.1}, "/dev/shm"),
        ({"clock_s": 1030.0}, "clocks"),
        ({"read_mib_s": 20.0}, "reading"),
    ],
)
def test_what_slows_or_confuses_is_noted(change: dict[str, object], name: str) -> None:
    check = checks(change)[name]
    assert check.status == "note" and "rank 3 on h2" in check.detail


def test_one_process_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a launcher there is nothing to compare, and a missing folder is found all the same."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # restored afterwards
        monkeypatch.delenv(name)
    monkeypatch.setattr(cli, "_set_up_logging", lambda rank: None)
    assert cli.main(["doctor", "--cluster", "--shards", str(tmp_path / "none")]) == 1
    assert "bad      shards" in capsys.readouterr().out


def test_two_real_ranks(tmp_path: Path) -> None:
    """Catches a collective that the ranks enter in another order, and sums that are not checked."""
    for rows, lines in run_ranks("tests.test_cluster:worker", 2, tmp_path):
        assert len(rows) == 2 and "rank 1 on " in rows[1]
        assert {"all-reduce within hosts", "all-gather within hosts"} <= {name for name, *_ in json.loads(lines)}


def worker() -> tuple[list[str], str]:
    """On one rank: what `examine` returns, in plain values."""
    from ilvr_ds.cluster import examine

    rows, found = examine(None)
    return rows, json.dumps([(check.name, check.status, check.detail) for check in found])
