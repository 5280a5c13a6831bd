from __future__ import annotations

import pytest

from ilvr_ds.evaluation.batches import cut_batches
from tests.ranks import run_ranks


@pytest.mark.parametrize("asked", ["while it answers", "while it waits for the other"])
def test_all_ranks_stop_where_one_is_asked_to(asked: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Catches a rank that answers all of its batches, or waits, while the other has left."""
    folder = tmp_path_factory.mktemp("stopped")
    found = run_ranks("tests.evaluation.workers:stopped_work", 2, folder, is_fresh=True, output=folder, asked=asked)
    assert found[0]["said"] == found[1]["said"] and "start the same command again" in found[0]["said"]
    mine, other = found[1]["answered"], found[0]["answered"]
    assert mine == ([1] if asked == "while it answers" else []), "the batch in hand is dropped"
    assert len(other) < 20, "the other one ends its own, and no more"
    done = len(other) + (len(mine) or 50)
    assert f"{done} of 100 samples" in found[0]["said"]


def test_batches_are_fixed_and_none_has_one_sample() -> None:
    assert cut_batches(16, 5) == [range(0, 5), range(5, 10), range(10, 16)]
    assert cut_batches(1, 5) == [range(0, 1)]
    assert cut_batches(3, 1) == [range(0, 1), range(1, 2), range(2, 3)]
