"""A second opinion on the demo task: cells read from pixels, questions answered from words and cells alone.

It shares no code with the generator, so that a slip in a question, a picture or an answer shows as a disagreement.
"""

from __future__ import annotations

import io
import itertools
import re
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

CELL = 28
FRAME = (96, 96, 96)
COLOURS = {
    "red": (204, 51, 17),
    "blue": (0, 114, 178),
    "green": (0, 158, 115),
    "black": (0, 0, 0),
    "orange": (230, 159, 0),
    "purple": (204, 121, 167),
    "cyan": (86, 180, 233),
    "yellow": (240, 228, 66),
}
STEPS = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}
BESIDE = {"above": "up", "below": "down", "left of": "left", "right of": "right"}

Cells = dict[tuple[int, int], str]
"""What stands where, as "red circle"; blank cells are absent."""


@dataclass(frozen=True)
class Picture:
    """The contents of a picture's cells and the marked cell."""

    side: int
    cells: Cells
    marked: tuple[int, int] | None = None


SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond", "ring", "hourglass")


def read_pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def read_picture(png: bytes) -> Picture:
    pixels = read_pixels(png)
    assert pixels.shape[0] == pixels.shape[1] and pixels.shape[0] % CELL == 0
    side = pixels.shape[0] // CELL
    cells, marked = {}, []
    for row, column in itertools.product(range(side), repeat=2):
        cell = pixels[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
        if tuple(cell[0, 0]) == FRAME:
            marked.append((row, column))
        if name := _read_cell(_on_white(cell)[2:-2, 2:-2].tobytes()):
            cells[row, column] = name
    assert len(marked) <= 1
    return Picture(side, cells, marked[0] if marked else None)


def _on_white(cell: np.ndarray) -> np.ndarray:
    """A shaded cell without its two dots and with white where its background is."""
    shade = cell[2:-2, 2:-2][-1, -1]
    if tuple(shade) in ((255, 255, 255), FRAME):  # the dot of the last cell stands there
        shade = cell[-3, 12]
    if tuple(shade) == (255, 255, 255) and not (cell[2:5] == FRAME).all(-1).any():
        return cell
    cell = cell.copy()
    cell[2:-2, 2:-2][(cell[2:-2, 2:-2] == FRAME).all(-1)] = shade
    cell[(cell == shade).all(-1)] = 255
    return cell


@cache
def _read_cell(pixels: bytes) -> str:
    """The figure in a cell without its border of two pixels; "" for a blank one."""
    inside = np.frombuffer(pixels, dtype=np.uint8).reshape(CELL - 4, CELL - 4, 3).astype(int)
    ink = (255 - inside).sum(axis=2)
    if not ink.any():
        return ""
    full = inside[ink == ink.max()]
    colour = min(COLOURS, key=lambda name: np.abs(full[0] - COLOURS[name]).sum())
    assert np.abs(full[0] - COLOURS[colour]).sum() < 6
    return f"{colour} {_read_shape(ink > ink.max() / 2)}"


def _read_shape(mask: np.ndarray) -> str:
    """By probing points, in units of 10 pixels from the middle (x right, y down)."""

    def at(x: float, y: float) -> bool:
        return bool(mask[int(12 + 10 * y), int(12 + 10 * x)])

    if not at(0, 0):
        return "ring"
    if at(-0.65, -0.85) and at(0.65, -0.85):
        return "square" if at(0.6, 0) else "hourglass"
    if at(-0.85, 0.8) and at(0.85, 0.8):
        return "triangle"
    if at(0.65, -0.65):
        return "circle"
    if at(0.85, 0):
        return "cross"
    return "diamond" if at(0, 0.85) else "star"


def solve(question: str, given: Picture) -> tuple[str, list[Picture]]:
    """The letter of the right option, and the helper pictures on the way to it."""
    if question.startswith("Describe"):
        return "", []
    ask, _, listed = question.rpartition("? ")
    options = dict(re.findall(r"([A-D])\) (.+?)(?= [A-D]\)|$)", listed))
    assert list(options) == list("ABCD") and len(set(options.values())) == 4
    answer, helpers = _solve(ask, given)
    return next(letter for letter, option in options.items() if option == answer), helpers


def _solve(ask: str, given: Picture) -> tuple[str, list[Picture]]:
    if ask.startswith("Build"):
        return _build(ask, given)
    if ask.startswith("Delete"):
        return _delete(ask, given)
    if ask.startswith("Move"):
        return _move(ask, given)
    if ask.startswith("Follow"):
        return _follow(ask, given)
    if not ask.startswith("Zoom"):
        return _look(ask, given), []
    return _zoom(ask, given)


def _build(ask: str, given: Picture) -> tuple[str, list[Picture]]:
    side = given.side // 2
    wanted: Cells = {}
    helpers = []
    for name, row, column in re.findall(r"(\w+ \w+) in row (\d), column (\d)", ask):
        wanted[int(row) - 1, int(column) - 1] = name
        helpers.append(Picture(side, dict(wanted)))
    matches = [name for name, cells in _quarters(given).items() if cells == wanted]
    assert len(matches) == 1
    return matches[0], helpers


def _delete(ask: str, given: Picture) -> tuple[str, list[Picture]]:
    cells, helpers = given.cells, []
    for word in re.findall(r"elete every (\w+)", ask):
        left = {place: name for place, name in cells.items() if word not in name.split()}
        assert len(left) < len(cells), "a deletion that deletes nothing"
        cells = left
        helpers.append(Picture(given.side, cells))
    return str(len(cells)), helpers


def _move(ask: str, given: Picture) -> tuple[str, list[Picture]]:
    mover = re.match(r"Move the (\w+ \w+) \d", ask)[1]
    (place,) = (place for place, name in given.cells.items() if name == mover)
    cells, helpers = dict(given.cells), []
    for count, direction in re.findall(r"(\d) cells? (\w+)", ask):
        del cells[place]
        for _ in range(int(count)):
            place = place[0] + STEPS[direction][0], place[1] + STEPS[direction][1]
            assert place not in cells and set(place) <= set(range(given.side)), "the way is not free"
        cells[place] = mover
        helpers.append(Picture(given.side, dict(cells)))
    row, column = STEPS[BESIDE[re.search(r"mark the cell (above|below|left of|right of) it", ask)[1]]]
    marked = place[0] + row, place[1] + column
    return cells[marked], [*helpers, Picture(given.side, cells, marked)]


def _follow(ask: str, given: Picture) -> tuple[str, list[Picture]]:
    colours = ("red", "blue", "green", "black", "orange", "purple", "cyan", "yellow")
    place, helpers = given.marked, []
    for _ in range(int(re.match(r"Follow (\d+) sign", ask)[1])):
        colour, shape = given.cells[place].split()
        place = SHAPES.index(shape), colours.index(colour)
        helpers.append(Picture(given.side, given.cells, place))
    return given.cells[place].split()[0], helpers


def _look(ask: str, given: Picture) -> str:
    if found := re.match(r"What (stands|colour is the shape) in row (\d), column (\d)", ask):
        name = given.cells[int(found[2]) - 1, int(found[3]) - 1]
        return name if found[1] == "stands" else name.split()[0]
    if ask == "What stands in the marked cell":
        return given.cells[given.marked]
    if found := re.match(r"Count every (\w+)", ask):
        return str(sum(found[1] in name.split() for name in given.cells.values()))
    figure = re.fullmatch(r"Where is the (\w+ \w+)", ask)[1]
    ((row, column),) = (place for place, name in given.cells.items() if name == figure)
    return f"row {row + 1}, column {column + 1}"


def _zoom(ask: str, given: Picture) -> tuple[str, list[Picture]]:
    quarter = re.match(r"Zoom in on the (\w+ \w+) quarter", ask)[1]
    shape = re.search(r"What colour is the (\w+) there", ask)[1]
    cells = _quarters(given)[quarter]
    found = {place: name for place, name in cells.items() if name.endswith(shape)}
    assert len(found) == 1
    side = given.side // 2
    return next(iter(found.values())).split()[0], [Picture(side, cells), Picture(side, found)]


def _quarters(given: Picture) -> dict[str, Cells]:
    half = given.side // 2
    names = {("top", "bottom")[v] + " " + ("left", "right")[h]: (v * half, h * half) for v in (0, 1) for h in (0, 1)}
    return {
        name: {
            (row - top, column - left): figure
            for (row, column), figure in given.cells.items()
            if top <= row < top + half and left <= column < left + half
        }
        for name, (top, left) in names.items()
    }
