"""Selection: zoom to the region that answers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ilvr_ds.demo.task.scene import QUARTERS, Figure, Scene, quarter_corner
from ilvr_ds.demo.task.spec import TaskSpec
from ilvr_ds.demo.task.words import FILLED, all_cells, all_figures, arrange, list_options, pick, some


@dataclass(frozen=True)
class Selection:
    """Zoom in on a quarter; what colour is the one shape of a kind there?

    Each quarter has the shape once, each in another of the four colours of the options.
    """

    spec: TaskSpec
    quarter: str
    shape: str
    options: list[str]

    @classmethod
    def draw(cls, rng: np.random.Generator, spec: TaskSpec) -> Selection:
        """Draw where to look, for which shape, and four colours."""
        quarter, shape = pick(rng, QUARTERS), pick(rng, spec.shape_names)
        options = arrange(rng, spec, some(rng, spec.colour_names, 4), spec.colour_names)
        return cls(spec, quarter, shape, options)

    @property
    def question(self) -> str:
        """Question and options."""
        return f"{self._zoom} What colour is the {self.shape} there? {list_options(self.options)}"

    def scenes(self, rng: np.random.Generator, right: int) -> list[Scene]:
        """The full picture, the quarter, and the quarter with nothing but the shape."""
        half = self.spec.half
        wrong = some(rng, [colour for colour in self.options if colour != self.options[right]], 3)
        fillers = [figure for figure in all_figures(self.spec) if figure.shape != self.shape]
        figures = {}
        for quarter in QUARTERS:
            row, column = quarter_corner(quarter, half)
            cells = some(rng, [(row + r, column + c) for r, c in all_cells(half)], half * half)
            colour = self.options[right] if quarter == self.quarter else wrong.pop()
            figures[cells[0]] = Figure(colour, self.shape)
            figures |= {cell: pick(rng, fillers) for cell in cells[1:] if rng.random() < FILLED}
        full = Scene(self.spec.grid, self.spec.grid, figures, is_shaded=self.spec.shaded)
        zoomed = full.crop(quarter_corner(self.quarter, half), half)
        found = {place: figure for place, figure in zoomed.figures.items() if figure.shape == self.shape}
        return [full, zoomed, zoomed.keep(found)]

    def rationale(self, scenes: list[Scene]) -> list[str]:
        """Zoom, say what stands beside the shape, find it. What stands beside it was drawn without regard to it."""
        quarter, found = scenes[1], scenes[2]
        beside = [str(quarter.figures[place]) for place in sorted(quarter.figures) if place not in found.figures]
        return [self._zoom, f"Beside the {self.shape}: {', '.join(beside) or 'nothing'}. Find the {self.shape}."]

    @property
    def _zoom(self) -> str:
        return f"Zoom in on the {self.quarter} quarter of the image."
