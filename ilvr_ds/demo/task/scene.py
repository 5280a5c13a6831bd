"""What a picture of the demo task shows: coloured shapes in the cells of a grid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

Place = tuple[int, int]
"""Row and column of a cell, from the top left."""

QUARTERS = ("top left", "top right", "bottom left", "bottom right")


class Figure(NamedTuple):
    """A coloured shape."""

    colour: str
    shape: str

    def __str__(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """Figures in a grid of `rows` x `columns` cells, and perhaps one cell with a mark."""

    rows: int
    columns: int
    figures: Mapping[Place, Figure]
    marked: Place | None = None
    is_shaded: bool = False
    """Whether the background tells the place of a cell: it turns blue from left to right and red from top to bottom."""
    cut_from: tuple[Place, Place] | None = None
    """Of a piece of a picture: its top left cell there, and that picture's rows and columns. Its cells keep their
    background."""

    def keep(self, figures: Mapping[Place, Figure]) -> Scene:
        """The same grid with other figures."""
        return replace(self, figures=figures)

    def moved(self, origin: Place, target: Place) -> Scene:
        """The scene with the figure at `origin` moved to the blank cell `target`."""
        rest = dict(self.figures)
        rest[target] = rest.pop(origin)
        return self.keep(rest)

    def crop(self, corner: Place, side: int) -> Scene:
        """The square of `side` cells whose top left cell is `corner`."""
        rows, columns = range(corner[0], corner[0] + side), range(corner[1], corner[1] + side)
        inside = {
            (row - corner[0], column - corner[1]): figure
            for (row, column), figure in self.figures.items()
            if row in rows and column in columns
        }
        cut_from = (corner, (self.rows, self.columns))
        return Scene(side, side, inside, is_shaded=self.is_shaded, cut_from=cut_from)

    def describe(self) -> str:
        """The scene in words, the same for equal scenes."""
        cells = "; ".join(f"{row},{column} {figure}" for (row, column), figure in sorted(self.figures.items()))
        return f"{self.rows}x{self.columns}: {cells} | {self.marked}"


def quarter_corner(quarter: str, half: int) -> Place:
    """The top left cell of a quarter of `half` x `half` cells."""
    number = QUARTERS.index(quarter)
    return number // 2 * half, number % 2 * half
