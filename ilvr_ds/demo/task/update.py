"""Update: move a shape, mark a cell, say what is in it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import numpy as np

from ilvr_ds.demo.task.scene import Figure, Place, Scene
from ilvr_ds.demo.task.spec import TaskSpec
from ilvr_ds.demo.task.words import FILLED, all_cells, all_figures, arrange, list_options, locate, pick, some

_STEPS = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}
_BESIDE = {"up": "above", "down": "below", "left": "left of", "right": "right of"}


@dataclass(frozen=True)
class Update:
    """Move a shape, mark the cell next to it; which shape is in the marked cell?

    All four options are in the picture, once each.
    """

    spec: TaskSpec
    mover: Figure
    moves: list[tuple[str, int]]
    side: str
    options: list[Figure]

    @classmethod
    def draw(cls, rng: np.random.Generator, spec: TaskSpec) -> Update:
        """Draw a walk that fits into the grid and does not meet itself, and five different figures."""
        mover, *figures = some(rng, all_figures(spec), 5)
        options = arrange(rng, spec, figures, all_figures(spec))
        while True:
            moves = [(pick(rng, list(_STEPS)), int(rng.integers(1, spec.half + 1))) for _ in range(spec.half - 1)]
            side = pick(rng, list(_STEPS))
            walk = cls(spec, mover, moves, side, options)
            turns = all(move[0] != following[0] for move, following in itertools.pairwise(moves))
            path = walk._path()
            height, width = _extent(path)
            if turns and len(set(path)) == len(path) and max(height, width) <= spec.grid:
                return walk

    @property
    def question(self) -> str:
        """Question and options."""
        moves = ", then ".join(self._move(move) for move in self.moves)
        ask = f"Move the {self.mover} {moves}. Then mark the cell {_BESIDE[self.side]} it."
        return f"{ask} Which shape is in the marked cell? {list_options(self.options)}"

    def scenes(self, rng: np.random.Generator, right: int) -> list[Scene]:
        """The first picture, the picture after each move, and the last one with the mark."""
        grid, path = self.spec.grid, self._path()
        height, width = _extent(path)
        top, left = min(place[0] for place in path), min(place[1] for place in path)
        down, along = int(rng.integers(grid - height + 1)) - top, int(rng.integers(grid - width + 1)) - left
        path = [(row + down, column + along) for row, column in path]

        figures = {path[0]: self.mover, path[-1]: self.options[right]}
        free = some(rng, [cell for cell in all_cells(grid) if cell not in path], grid * grid - len(path))
        others = [option for option in self.options if option != self.options[right]]
        figures |= dict(zip(free, others, strict=False))
        fillers = [figure for figure in all_figures(self.spec) if figure != self.mover and figure not in self.options]
        figures |= {cell: pick(rng, fillers) for cell in free[len(others) :] if rng.random() < FILLED}

        scenes = [Scene(grid, grid, figures, is_shaded=self.spec.shaded)]
        origin, walked = path[0], 0
        for _, length in self.moves:
            walked += length
            scenes.append(scenes[-1].moved(origin, path[walked]))
            origin = path[walked]
        return [*scenes, replace(scenes[-1], marked=path[-1])]

    def rationale(self, scenes: list[Scene]) -> list[str]:
        """Where the shape is, move by move, then the mark. The place was drawn before what is in the marked cell."""
        (start,) = (place for place, figure in scenes[0].figures.items() if figure == self.mover)
        names = [f"the {self.mover}", *["it"] * (len(self.moves) - 1)]
        moves = [f"Move {name} {self._move(move)}." for name, move in zip(names, self.moves, strict=True)]
        moves[0] = f"The {self.mover} is in {locate(start)}. {moves[0]}"
        return [*moves, f"Mark the cell {_BESIDE[self.side]} it."]

    def _path(self) -> list[Place]:
        """The cells from the mover's over each cell that it crosses to the marked one, from (0, 0)."""
        path = [(0, 0)]
        for direction, length in [*self.moves, (self.side, 1)]:
            row, column = _STEPS[direction]
            for _ in range(length):
                path.append((path[-1][0] + row, path[-1][1] + column))
        return path

    @staticmethod
    def _move(move: tuple[str, int]) -> str:
        return f"{move[1]} cell{'s' if move[1] > 1 else ''} {move[0]}"


def _extent(path: list[Place]) -> tuple[int, int]:
    """Height and width in cells of the box around a path."""
    rows, columns = [place[0] for place in path], [place[1] for place in path]
    return max(rows) - min(rows) + 1, max(columns) - min(columns) + 1
