"""Trail: follow signs from cell to cell; each step follows from the picture before it alone.

The grid holds each figure once. A figure is a sign: its shape names the row of the next cell and its colour the column
(the first shape of the spec the first row, and so on). The signs lead through all cells in one circle, so that no trail
is shorter than it looks. Helper picture n has the mark on the n-th cell, which is also the region that its latent step
is about. The words say nothing of it, unless the spec names what is seen, which makes a chain of thought in text: the
baseline that needs no latents.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ilvr_ds.demo.task.scene import Figure, Place, Scene
from ilvr_ds.demo.task.spec import TaskSpec
from ilvr_ds.demo.task.words import all_cells, arrange, list_options, some


@dataclass(frozen=True)
class Trail:
    """From the marked cell follow a number of signs; what is the colour of the last figure?"""

    spec: TaskSpec
    options: list[str]

    @classmethod
    def draw(cls, rng: np.random.Generator, spec: TaskSpec) -> Trail:
        """Draw four colours."""
        return cls(spec, arrange(rng, spec, some(rng, spec.colour_names, 4), spec.colour_names))

    @property
    def question(self) -> str:
        """Question and options."""
        signs = f"{self.spec.signs} sign{'s' if self.spec.signs > 1 else ''}"
        return f"Follow {signs} from the marked cell. What is the colour there? {list_options(self.options)}"

    def scenes(self, rng: np.random.Generator, right: int) -> list[Scene]:
        """The picture with the first cell marked, then with the mark on each cell of the trail."""
        grid, signs = self.spec.grid, self.spec.signs
        column = self.spec.colour_names.index(self.options[right])
        circle = some(rng, all_cells(grid), grid * grid)
        while circle[(signs + 1) % len(circle)][1] != column:  # where the last figure points
            circle = some(rng, all_cells(grid), grid * grid)
        figures = {cell: self._sign(circle[(number + 1) % len(circle)]) for number, cell in enumerate(circle)}
        return [Scene(grid, grid, figures, circle[number], is_shaded=True) for number in range(signs + 1)]

    def rationale(self, scenes: list[Scene]) -> list[str]:
        """The same words for every trail, or the name of each figure on the way."""
        if not self.spec.named:
            return ["Follow the sign."] * self.spec.signs
        return [f"Follow the sign to the {scene.figures[_marked(scene)]}." for scene in scenes[1:]]

    def _sign(self, target: Place) -> Figure:
        """The figure that points to a cell."""
        return Figure(self.spec.colour_names[target[1]], self.spec.shape_names[target[0]])


def _marked(scene: Scene) -> Place:
    assert scene.marked is not None
    return scene.marked
