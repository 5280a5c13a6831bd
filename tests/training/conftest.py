from __future__ import annotations

import logging

import pytest


@pytest.fixture(autouse=True)
def caplog_hears_us(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo what the command line does to the logger, for a test file that ran before."""
    logger = logging.getLogger("ilvr_ds")
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "propagate", True)
