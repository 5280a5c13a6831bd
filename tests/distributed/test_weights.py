"""Weights that ZeRO-3 gathers beside other work."""

from __future__ import annotations

from pathlib import Path

from tests.ranks import run_ranks


def test_weights_are_gathered_when_the_optimizer_has_written_them(tmp_path: Path) -> None:
    """Catches a forward that may read the weights of the step before. Without the mend it must be seen: when DeepSpeed
    takes care itself, drop `gather_when_written`."""
    worker = "tests.distributed.workers_weights:gathered_weights"
    mended = run_ranks(worker, 2, tmp_path / "1", is_mended=True)
    stock = run_ranks(worker, 2, tmp_path / "2", is_mended=False)
    assert all(found[True] > 3 and not found[False] for found in mended), mended
    assert all(found[False] > 3 for found in stock), stock
