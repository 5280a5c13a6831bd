"""Free answers during training on real ranks: those of the released code, and training goes on as without them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.workers_generation import SHORT
from tests.golden_set import golden_set
from tests.ranks import run_ranks
from tests.runs import ZERO3

PERSISTENT = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 10**12}}
ZERO1 = {"zero_optimization": {"stage": 1}}


@pytest.mark.parametrize("zero", [ZERO3, PERSISTENT, ZERO1], ids=["zero3", "zero3-persistent", "zero1"])
def test_the_student_answers_between_steps(zero: dict[str, Any], tmp_path: Path) -> None:
    """Catches ranks that wait for each other where one has ended, attention of packed rows that ignores the cache, and
    weights that cannot be trained after they were gathered for an answer."""
    golden = golden_set()
    ranks = run_ranks("tests.distributed.workers_generation:answers_between_steps", 2, tmp_path, zero=zero)
    expected = [golden.expected[f"{sample.id}.gen.new_ids"].flatten().tolist() for sample in golden.samples]
    assert ranks[0]["answers"] == expected[0::2], "with latents, to the last token"
    [first, *_] = ranks[1]["answers"]
    assert first == expected[1][: len(first)] and len(first) <= SHORT, "the other rank ended early"
    assert ranks[0]["metrics"] == ranks[1]["metrics"] and ranks[0]["metrics"]["eval/generated"] == len(expected)
    for rank in ranks:
        with_answers, without = rank["losses"]
        assert with_answers == pytest.approx(without, rel=1e-6)
