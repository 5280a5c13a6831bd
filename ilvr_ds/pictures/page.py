"""A page laid out in pixels from its top left corner: images, words and outlines, without axes.

A panel of matplotlib costs 20 ms of the CPU whatever it shows, and a page of maps has dozens: what needs no axis is
placed on the figure itself.
"""

from __future__ import annotations

import textwrap
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.patches import Rectangle
from matplotlib.transforms import IdentityTransform
from numpy.typing import NDArray
from PIL import Image

from ilvr_ds.pictures.style import COLOURS, DPI, HEAT, NORMAL, SMALL, WIDTH_IN, new_figure, save

Pixels = NDArray[np.uint8]
WIDTH = int(WIDTH_IN * DPI)
LINE = 16
"""From a line of NORMAL text to the next."""
FRAME = 200
"""Grey."""
MISSING = "#E8E8E8"
"""Of a map where it has no value."""


class Page:
    """A white page, WIDTH pixels wide. Places are (x, y) of the top left corner of what is put there."""

    def __init__(self, height: int) -> None:
        self.height = height
        self.figure = new_figure(height / DPI)
        self._images = np.full((height, WIDTH, 3), 255, dtype=np.uint8)

    def words(self, x: float, y: float, text: str, size: float = NORMAL, align: str = "left") -> None:
        """One line or several; `x` is their left, centre or right."""
        self.figure.text(
            x / WIDTH, 1 - y / self.height, text, fontsize=size, ha=align, va="top", linespacing=LINE / 13.2,
            parse_math=False,
        )  # fmt: skip

    def image(self, x: int, y: int, pixels: Pixels) -> None:
        """An image [H, W, 3] in its own size, in a grey frame: many are white at their edges."""
        self._images[y - 1 : y + pixels.shape[0] + 1, x - 1 : x + pixels.shape[1] + 1] = FRAME
        self._images[y : y + pixels.shape[0], x : x + pixels.shape[1]] = pixels

    def box(self, x: float, y: float, width: float, height: float) -> None:
        """An outline that shows on dark and on light: white below, vermilion on top."""
        for colour, line in (("white", 2.6), (COLOURS[3], 1.6)):
            self.figure.add_artist(
                Rectangle(
                    (x, self.height - y), width, -height, fill=False, edgecolor=colour, linewidth=line,
                    transform=IdentityTransform(),
                )
            )  # fmt: skip

    def mark(self, x: float, y: float, text: str, room: float) -> None:
        """White letters on black around a centre, as large as `room` pixels let them be."""
        size = min(NORMAL, max(5.5, 0.55 * room * 72 / DPI))
        self.figure.text(
            x / WIDTH, 1 - y / self.height, text, fontsize=size, ha="center", va="center", color="white",
            fontweight="bold", bbox={"facecolor": "black", "alpha": 0.65, "pad": 1.0, "edgecolor": "none"},
        )  # fmt: skip

    def scale(self, x: int, y: int, length: int, low: float, high: float) -> None:
        """The colours of a heat map from `low` to `high`, upright, with both ends in figures."""
        strip = np.linspace(high, low, length, dtype=np.float32)[:, None].repeat(12, axis=1)
        self.image(x, y, coloured(strip, low, high))
        self.words(x + 16, y - 2, f"{high:.2f}", SMALL)
        self.words(x + 16, y + length - 12, f"{low:.2f}", SMALL)

    def save(self, path: Path) -> None:
        """Write a PNG file."""
        self.figure.figimage(self._images, origin="upper")  # one for all: each that is drawn apart costs 2 ms
        save(self.figure, path)


def fitted(pixels: Pixels, width: int, height: int) -> Pixels:
    """An image [H, W, 3] as large as it can be within a box."""
    ratio = min(width / pixels.shape[1], height / pixels.shape[0])
    size = max(1, round(pixels.shape[1] * ratio)), max(1, round(pixels.shape[0] * ratio))
    method = Image.Resampling.NEAREST if ratio > 1 else Image.Resampling.BOX
    return np.asarray(Image.fromarray(pixels).resize(size, method))


def coloured(values: NDArray[np.float32], low: float, high: float) -> Pixels:
    """A map [R, C] in the colours of heat, [R, C, 3]; what is not finite is grey."""
    palette = colormaps[HEAT].with_extremes(bad=MISSING)
    spread = np.ma.masked_invalid((values - low) / max(high - low, 1e-9))
    return np.asarray(palette(spread, bytes=True))[..., :3]


def limits(values: NDArray[np.float32]) -> tuple[float, float]:
    """The smallest and the largest finite value; 0 and 1 where there is none."""
    finite = values[np.isfinite(values)]
    return (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)


def wrapped(text: str, columns: int, lines: int) -> str:
    """Text in lines of so many letters; what is longer loses its beginning, where it is least news."""
    rows = [row for part in text.splitlines() for row in textwrap.wrap(part, columns) or [""]]
    return "\n".join(rows if len(rows) <= lines else ["[...]", *rows[len(rows) - lines + 1 :]])
