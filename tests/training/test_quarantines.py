"""Bad samples of a mixture: each set has its own numbers, and its own limit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ilvr_ds.config import DataSetConfig
from ilvr_ds.data.mixture import Mixture
from ilvr_ds.data.window import BadSample
from ilvr_ds.errors import UserError
from ilvr_ds.training.quarantine import Quarantine
from ilvr_ds.training.quarantines import Quarantines
from tests.data.packing import make_dataset


@pytest.fixture
def mixture(tmp_path: Path) -> Mixture:
    for name, samples in (("a", 10), ("b", 200)):
        make_dataset(tmp_path / name, samples)
    return Mixture.open([DataSetConfig(str(tmp_path / name), name) for name in ("a", "b")])


def quarantines(mixture: Mixture, folder: Path) -> Quarantines:
    pairs = zip(mixture.sets, mixture.names, strict=True)
    return Quarantines(mixture, [Quarantine(folder, shards, 0.1, True, name) for shards, name in pairs])


def bad(number: int, name: str) -> BadSample:
    return BadSample(number, name, "shard-000000.tar", 512, f"reason {number}")


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]


def test_a_bad_sample_is_listed_under_its_set_with_its_number_there(mixture: Mixture, tmp_path: Path) -> None:
    one = quarantines(mixture, tmp_path)
    one.add([bad(3, "a/sample-3"), bad(13, "b/sample-3")], (4, 12), retries=2)
    found = [(line["set"], line["number"], line["id"], line["data"]) for line in lines(tmp_path)]
    assert found == [
        ("a", 3, "a/sample-3", mixture.sets[0].fingerprint),
        ("b", 3, "b/sample-3", mixture.sets[1].fingerprint),
    ]
    assert one.metrics() == {
        "data/skipped": 2.0, "data/retries": 2.0, "data/skipped_by_set/a": 1.0, "data/skipped_by_set/b": 1.0,
    }  # fmt: skip


def test_totals_of_each_set_go_on_and_nothing_is_listed_twice(mixture: Mixture, tmp_path: Path) -> None:
    one = quarantines(mixture, tmp_path)
    one.add([bad(13, "b")], (4, 12), 1)
    two = quarantines(mixture, tmp_path)
    two.load_state_dict(json.loads(json.dumps(one.state_dict())))
    two.add([bad(13, "b"), bad(3, "a")], (4, 12), 0)
    assert two.metrics()["data/skipped_by_set/b"] == 2.0 and two.skipped == 3
    assert [line["set"] for line in lines(tmp_path)] == ["b", "a"]


def test_a_small_set_that_is_all_bad_ends_the_run(mixture: Mixture, tmp_path: Path) -> None:
    """Catches one that hides in a mixture: 2 of 64 samples are few, but they are all that came of the set."""
    one = quarantines(mixture, tmp_path)
    one.add([bad(0, "a"), bad(1, "a")], (2, 62), 0)
    assert one.exceeded
    with pytest.raises(UserError, match=r"2 of the last 2 samples of \S+/a could not be used"):
        one.check()
    other = quarantines(mixture, tmp_path)
    other.add([bad(10, "b"), bad(11, "b")], (2, 62), 0)
    assert not other.exceeded
