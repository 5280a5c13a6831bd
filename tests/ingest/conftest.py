from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.packing import image_bytes


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An image root with a.png, b.png and c.png."""
    folder = tmp_path / "images"
    folder.mkdir()
    for shade, name in enumerate(("a.png", "b.png", "c.png")):
        (folder / name).write_bytes(image_bytes(shade))
    return folder
