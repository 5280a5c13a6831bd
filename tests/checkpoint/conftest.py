from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a run's checkpoints will lie."""
    return tmp_path / "run" / "checkpoints"
