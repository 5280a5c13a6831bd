from __future__ import annotations

import pytest

from ilvr_ds.planning.memory import GIB, Memory
from ilvr_ds.planning.report import verdict


@pytest.mark.parametrize(
    ("needed", "words"),
    [
        (70.0, "fits: 10.0 GiB to spare"),
        (77.7, "tight: 2.3 GiB to spare, and a plan may be 2.4 off (3%)"),
        (80.0, "tight: 0.0 GiB to spare, and a plan may be 2.4 off (3%)"),
        (81.0, "does not fit: 1.0 GiB too much"),
    ],
)
def test_what_fits_fits_with_a_margin(needed: float, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a promise that a plan, whose peaks are right within 2.4 %, cannot keep."""
    monkeypatch.setattr(Memory, "needed", needed * GIB)
    assert verdict(Memory({}, {}, {}, 0.0), 80.0) == words
