"""Questions with images, to see whether others make the same of an export as we do."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from ilvr_ds.data.sample import Sample

LIMIT = "data.max_image_pixels=24000"


def picture(seed: int, width: int, height: int) -> bytes:
    """Coloured cells, blurred at their edges."""
    cells = np.random.default_rng(seed).integers(0, 256, (height // 10, width // 10, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(cells).resize((width, height)).save(buffer, "PNG")
    return buffer.getvalue()


def questions(cell: int = 28) -> list[Sample]:
    """About no image, two alike in size, and two of which the last is above `LIMIT`; cell: pixels of a merged patch,
    so that the others are not scaled."""
    small, other, large = picture(0, 5 * cell, 4 * cell), picture(2, 5 * cell, 4 * cell), picture(1, 300, 200)
    return [
        Sample("none", "What is left of 12 circles?", ()),
        Sample("one", "How many remain?", (), (small,)),
        Sample("another", "How many remain?", (), (other,)),
        Sample("two", "Is <image> what follows <image>?", (), (small, large)),
    ]
