from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def caplog_hears_us_alone(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Undo what the command line does to the logger, for a test file that ran before; libraries log at any time."""
    logger = logging.getLogger("ilvr_ds")
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "propagate", True)
    ours = logging.Filter(logger.name)
    caplog.handler.addFilter(ours)
    yield
    caplog.handler.removeFilter(ours)
