"""A page laid out in pixels from its top left corner: images, words and outlines, without axes.

A matplotlib panel costs 20 ms of CPU time whatever it shows, a line of text 3 ms; a page of maps has dozens of both. So
Pillow puts images and words together, in matplotlib's font and colours, and the figure holds a single image.
"""

from __future__ import annotations

import textwrap
from functools import cache
from pathlib import Path
from unicodedata import east_asian_width

import numpy as np
from matplotlib import colormaps, get_data_path
from matplotlib.artist import Artist
from matplotlib.backend_bases import RendererBase
from matplotlib.patches import Rectangle
from matplotlib.transforms import IdentityTransform
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from ilvr_ds.pictures.fonts import runs
from ilvr_ds.pictures.style import COLOURS, DPI, HEAT, NORMAL, SMALL, WIDTH_IN, new_figure, save

Pixels = NDArray[np.uint8]
WIDTH = int(WIDTH_IN * DPI)
LINE = 16
"""Pixels from one line of NORMAL text to the next."""
FRAME = "#C8C8C8"
_SECOND_HALF = "\ue000"
"""Placeholder for the second column of a wide letter while text is wrapped."""
MISSING = "#E8E8E8"
"""Colour of a map where it has no value."""


class Page:
    """A white page, WIDTH pixels wide. Positions (x, y) are top left corners."""

    def __init__(self, height: int) -> None:
        self.height = height
        self._figure = new_figure(height / DPI)
        self._raster = Image.new("RGB", (WIDTH, height), "white")
        self._pen = ImageDraw.Draw(self._raster)

    def words(self, x: float, y: float, text: str, size: float = NORMAL) -> None:
        """Write one or more lines of text."""
        ascent = _font(size).getmetrics()[0]
        for number, line in enumerate(text.splitlines()):
            end = x
            for entry, piece in runs(line):
                font = _other_font(entry.fname, getattr(entry, "index", 0), size) if entry else _font(size)
                self._pen.text((end, y + number * LINE + ascent), piece, fill="black", font=font, anchor="ls")
                end += font.getlength(piece)

    def image(self, x: int, y: int, pixels: Pixels) -> None:
        """Place an image [H, W, 3] unscaled, in a grey frame: many are white at their edges."""
        height, width = pixels.shape[:2]
        self._pen.rectangle((x - 1, y - 1, x + width, y + height), outline=FRAME)
        self._raster.paste(Image.fromarray(pixels), (x, y))

    def box(self, x: float, y: float, width: float, height: float) -> None:
        """Draw an outline that shows on dark and on light: white below, vermilion on top."""
        for colour, line in (("white", 2.6), (COLOURS[3], 1.6)):
            self._figure.add_artist(
                Rectangle(
                    (x, self.height - y), width, -height, fill=False, edgecolor=colour, linewidth=line,
                    transform=IdentityTransform(),
                )
            )  # fmt: skip

    def mark(self, x: float, y: float, text: str, room: float) -> None:
        """Write white letters on black around a centre, as large as fit in `room` pixels."""
        font = _font(min(NORMAL, max(5.5, 0.55 * room * 72 / DPI)), bold=True)
        left, top, right, bottom = self._pen.textbbox((x, y), text, font=font, anchor="mm")
        self._pen.rectangle((left - 3, top - 3, right + 3, bottom + 3), fill="#333333")
        self._pen.text((x, y), text, fill="white", font=font, anchor="mm")

    def scale(self, x: int, y: int, length: int, low: float, high: float) -> None:
        """Draw the colour bar of a heat map, upright, with its ends `low` and `high` in figures."""
        strip = np.linspace(high, low, length, dtype=np.float32)[:, None].repeat(12, axis=1)
        self.image(x, y, coloured(strip, low, high))
        self.words(x + 17, y, f"{high:.2f}", SMALL)
        self.words(x + 17, y + length - 12, f"{low:.2f}", SMALL)

    def save(self, path: Path) -> None:
        """Write a PNG file."""
        self._figure.add_artist(_Raster(np.asarray(self._raster.convert("RGBA"))))
        save(self._figure, path)


class _Raster(Artist):
    """Pixels of the whole figure [H, W, 4], below all else. Matplotlib's own image would resample them, which took more
    than half the time of a page."""

    zorder = 0

    def __init__(self, pixels: Pixels) -> None:
        super().__init__()
        self.pixels = pixels

    def draw(self, renderer: RendererBase) -> None:
        renderer.draw_image(renderer.new_gc(), 0, 0, self.pixels[::-1])


@cache
def _font(points: float, bold: bool = False) -> ImageFont.FreeTypeFont:
    """Matplotlib's font."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(get_data_path(), "fonts/ttf", name)), points * DPI / 72)


@cache
def _other_font(file: str, index: int, points: float) -> ImageFont.FreeTypeFont:
    """A font of a file that may hold several."""
    return ImageFont.truetype(file, points * DPI / 72, index=index)


def fitted(pixels: Pixels, width: int, height: int) -> Pixels:
    """Scale an image [H, W, 3] to fit a box."""
    ratio = min(width / pixels.shape[1], height / pixels.shape[0])
    size = max(1, round(pixels.shape[1] * ratio)), max(1, round(pixels.shape[0] * ratio))
    method = Image.Resampling.NEAREST if ratio > 1 else Image.Resampling.BOX
    return np.asarray(Image.fromarray(pixels).resize(size, method))


def coloured(values: NDArray[np.float32], low: float, high: float) -> Pixels:
    """A map [R, C] in heat colours, [R, C, 3]; grey where it is not finite."""
    palette = colormaps[HEAT].with_extremes(bad=MISSING)
    spread = np.ma.masked_invalid((values - low) / max(high - low, 1e-9))
    return np.asarray(palette(spread, bytes=True))[..., :3]


def limits(values: NDArray[np.float32]) -> tuple[float, float]:
    """The smallest and the largest finite value; 0 and 1 if there are none."""
    finite = values[np.isfinite(values)]
    return (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)


def wrapped(text: str, columns: int, lines: int) -> str:
    """Wrap text to `columns` letters; beyond `lines` lines it loses its beginning, the older part.

    Letters of Chinese, Japanese and Korean count two columns.
    """
    spread = "".join(letter + _SECOND_HALF * (east_asian_width(letter) in "WF") for letter in text)
    rows = [row for part in spread.splitlines() for row in textwrap.wrap(part, columns) or [""]]
    rows = [row.replace(_SECOND_HALF, "") for row in rows]
    return "\n".join(rows if len(rows) <= lines else ["[...]", *rows[len(rows) - lines + 1 :]])
