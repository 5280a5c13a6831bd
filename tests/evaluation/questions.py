"""Questions with images, to see whether others make the same of an export as we do."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from ilvr_ds.data.sample import Sample


def picture(seed: int, width: int, height: int) -> bytes:
    """Coloured cells, blurred at their edges."""
    cells = np.random.default_rng(seed).integers(0, 256, (height // 10, width // 10, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(cells).resize((width, height)).save(buffer, "PNG")
    return buffer.getvalue()


def questions() -> list[Sample]:
    """About no image, two alike in size, and two of which one is above the limit of pixels."""
    small, other, large = picture(0, 140, 112), picture(2, 140, 112), picture(1, 300, 200)
    return [
        Sample("none", "What is left of 12 circles?", ()),
        Sample("one", "How many remain?", (), (small,)),
        Sample("another", "How many remain?", (), (other,)),
        Sample("two", "Is <image> what follows <image>?", (), (small, large)),
    ]
