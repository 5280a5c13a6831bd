"""Loading under ZeRO-3 takes a node's memory once, not once for each rank."""

from __future__ import annotations

from pathlib import Path

import pytest

from ilvr_ds.demo.tiny import TinySize
from tests.bench.load_memory import measure, write_model

SIZE = TinySize(768, 2048, 8, 12, 4, vision_hidden_size=32, vision_heads=2, vocab_size=512)
"""200 MB: more than what a rank needs besides."""


@pytest.mark.drill
def test_two_ranks_hold_one_model_between_them(tmp_path: Path) -> None:
    """Catches a version of transformers that reads all weights on every rank."""
    size = write_model(tmp_path, SIZE)
    ranks = measure(tmp_path, 3, 2)
    assert all(rank["peak"] < 0.8 * size for rank in ranks), (size, ranks)
    assert sum(rank["kept"] for rank in ranks) < 1.25 * size, (size, ranks)
