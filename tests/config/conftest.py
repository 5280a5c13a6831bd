from __future__ import annotations

from pathlib import Path

import pytest

from ilvr_ds.config import Recipe, load_recipe
from tests.config.mistakes import MINIMAL, Load


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Loads the minimal recipe with lines added behind its 5 lines."""

    def load(more: str = "", *overrides: str, text: str = MINIMAL) -> Recipe:
        path = tmp_path / "r.yaml"
        path.write_text(text + more)
        return load_recipe(path, overrides)

    return load
