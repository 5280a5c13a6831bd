"""Scenes as PNG files: every cell is exactly one merged patch of Qwen2.5-VL, 28x28 pixels.

A cell's pixels depend on its content alone, so that the features of a random, frozen vision tower can still tell
what a cell holds. The colours are those of Okabe and Ito (red: Tol), which people with colour blindness can tell apart.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from ilvr_ds.demo.task.scene import Figure, Place, Scene
from ilvr_ds.demo.task.spec import COLOURS, SHAPES

CELL = 28
PALETTE = {
    "red": (204, 51, 17),
    "blue": (0, 114, 178),
    "green": (0, 158, 115),
    "orange": (230, 159, 0),
    "purple": (204, 121, 167),
    "black": (0, 0, 0),
    "cyan": (86, 180, 233),
    "yellow": (240, 228, 66),
}
FRAME = (96, 96, 96)
"""Colour of the mark, a frame along the inside of its cell."""

_FRAME_WIDTH = 2
_RADIUS = 10  # of a shape, in pixels: clear of the frame
_LEVELS = 16  # of cover, from 0 (white) to 15 (the colour itself), so that edges are smooth
_FINE = 8  # shapes are drawn this many times larger and averaged down
_DOT = 3
_FRAME_INDEX = len(COLOURS) * _LEVELS

_SHADE_DOWN, _SHADE_ALONG = np.array([0, 50, 50]), np.array([50, 50, 0])
"""What the background loses of red, green and blue from the top to the bottom and from the left to the right."""

Tile = NDArray[np.uint8]
Point = tuple[float, float]


def encode_scene(scene: Scene) -> bytes:
    """The scene as a PNG of rows*28 x columns*28 pixels, on white or on its shades."""
    image = _shaded(scene) if scene.is_shaded else _on_white(scene)
    file = io.BytesIO()
    image.save(file, format="PNG", compress_level=1)
    return file.getvalue()


def _on_white(scene: Scene) -> Image.Image:
    """An image with a palette."""
    pixels = np.zeros((scene.rows * CELL, scene.columns * CELL), dtype=np.uint8)
    for place, figure in scene.figures.items():
        _cell(pixels, place)[:] = _tile(figure)
    if scene.marked is not None:
        _draw_frame(_cell(pixels, scene.marked), _FRAME_INDEX)
    image = Image.frombytes("P", (pixels.shape[1], pixels.shape[0]), pixels.tobytes())
    image.putpalette(_palette())
    return image


def _shaded(scene: Scene) -> Image.Image:
    """An RGB image."""
    pixels = np.empty((scene.rows * CELL, scene.columns * CELL, 3), dtype=np.uint8)
    (top, left), (rows, columns) = scene.cut_from or ((0, 0), (scene.rows, scene.columns))
    for row in range(scene.rows):
        for column in range(scene.columns):
            place = ((top + row) / (rows - 1), (left + column) / (columns - 1))
            cell = _cell(pixels, (row, column))
            cell[:] = _shaded_tile(scene.figures.get((row, column)), *place)
            if scene.marked == (row, column):
                _draw_frame(cell, FRAME)
    return Image.fromarray(pixels)


def _cell(pixels: NDArray[np.uint8], place: Place) -> NDArray[np.uint8]:
    row, column = place
    return pixels[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]


@lru_cache(maxsize=4096)
def _shaded_tile(figure: Figure | None, down: float, along: float) -> Tile:
    """A cell on the background of its place (0 to 1 from the top and from the left), [28, 28, 3].

    A frozen random tower hardly tells neighbouring shades apart, so two dots on the cell's rims show the place too.
    """
    shade = 255 - down * _SHADE_DOWN - along * _SHADE_ALONG
    tile = np.broadcast_to(shade, (CELL, CELL, 3))
    if figure is not None:
        tile = tile + (np.array(PALETTE[figure.colour]) - shade) * _mask(figure.shape)[:, :, None]
    pixels = np.rint(tile).astype(np.uint8)
    first, last = _FRAME_WIDTH, CELL - _FRAME_WIDTH - _DOT
    y, x = (round(first + part * (last - first)) for part in (down, along))
    pixels[y : y + _DOT, first : first + _DOT] = FRAME
    pixels[first : first + _DOT, x : x + _DOT] = FRAME
    return pixels


@lru_cache(maxsize=1)
def _palette() -> bytes:
    """RGB bytes: 16 levels from white to each colour, then the frame's colour."""
    cover = np.linspace(0, 1, _LEVELS)[None, :, None]
    colours = np.array([PALETTE[name] for name in COLOURS])[:, None, :]
    ramps = np.rint(255 + (colours - 255) * cover).astype(np.uint8)
    return ramps.tobytes() + bytes(FRAME)


@lru_cache(maxsize=len(SHAPES) * len(COLOURS))
def _tile(figure: Figure) -> Tile:
    """Palette indices of a cell that holds `figure`, [28, 28]."""
    cover = np.rint(_mask(figure.shape) * (_LEVELS - 1)).astype(np.uint8)
    return np.where(cover > 0, cover + COLOURS.index(figure.colour) * _LEVELS, 0).astype(np.uint8)


def _draw_frame(tile: Tile, ink: int | tuple[int, int, int]) -> None:
    """Paint the mark along the inside of a cell, in place."""
    for edge in (tile[:_FRAME_WIDTH], tile[-_FRAME_WIDTH:], tile[:, :_FRAME_WIDTH], tile[:, -_FRAME_WIDTH:]):
        edge[:] = ink


def _mask(shape: str) -> NDArray[np.float64]:
    """How much of each pixel of a cell the shape covers, [28, 28] in 0..1."""
    canvas = Image.new("L", (CELL * _FINE, CELL * _FINE))
    _PAINTERS[shape](ImageDraw.Draw(canvas))
    fine = np.asarray(canvas, dtype=np.float64) / 255
    mask: NDArray[np.float64] = fine.reshape(CELL, _FINE, CELL, _FINE).mean(axis=(1, 3))
    return mask


def _to_canvas(points: list[Point]) -> list[Point]:
    """From units of the radius around the cell's middle (x right, y down) to canvas pixels."""
    middle = CELL * _FINE / 2
    return [(middle + x * _RADIUS * _FINE, middle + y * _RADIUS * _FINE) for x, y in points]


def _polygon(points: list[Point]) -> Callable[[ImageDraw.ImageDraw], None]:
    return lambda draw: draw.polygon(_to_canvas(points), fill=255)


def _disc(hole: float) -> Callable[[ImageDraw.ImageDraw], None]:
    def paint(draw: ImageDraw.ImageDraw) -> None:
        draw.ellipse(_to_canvas([(-1, -1), (1, 1)]), fill=255)
        if hole:
            draw.ellipse(_to_canvas([(-hole, -hole), (hole, hole)]), fill=0)

    return paint


def _star_points(inner: float) -> list[Point]:
    """Five points up, at radius 1, with the notches between them at radius `inner`."""
    corners = [(1.1 if corner % 2 == 0 else inner, math.pi * (corner / 5 - 0.5)) for corner in range(10)]
    return [(radius * math.cos(angle), radius * math.sin(angle)) for radius, angle in corners]


def _cross_points(arm: float) -> list[Point]:
    """A plus sign whose arms are 2 * `arm` wide."""
    a = arm
    return [(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a), (a, 1), (-a, 1), (-a, a), (-1, a), (-1, -a), (-a, -a)]


_PAINTERS: dict[str, Callable[[ImageDraw.ImageDraw], None]] = {
    "circle": _disc(hole=0),
    "square": _polygon([(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)]),
    "triangle": _polygon([(0, -1), (1.05, 0.9), (-1.05, 0.9)]),
    "star": _polygon(_star_points(inner=0.42)),
    "cross": _polygon(_cross_points(arm=0.3)),
    "diamond": _polygon([(0, -1.1), (0.75, 0), (0, 1.1), (-0.75, 0)]),
    "ring": _disc(hole=0.6),
    "hourglass": _polygon([(-0.9, -1), (0.9, -1), (-0.9, 1), (0.9, 1)]),
}
