"""Deletion: remove shapes step by step, count what remains."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ilvr_ds.demo.task.scene import Figure, Scene
from ilvr_ds.demo.task.spec import TaskSpec
from ilvr_ds.demo.task.words import all_cells, all_figures, arrange, list_options, pick, some


@dataclass(frozen=True)
class Deletion:
    """Delete every shape of a colour, every shape of a kind, and so on in turn; how many remain?

    How many shapes there are before the deletions does not depend on how many remain.
    """

    spec: TaskSpec
    criteria: list[str]
    options: list[int]

    @classmethod
    def draw(cls, rng: np.random.Generator, spec: TaskSpec) -> Deletion:
        """Draw what to delete and four numbers in a row, shuffled."""
        colours, shapes = some(rng, spec.colour_names, 2), some(rng, spec.shape_names, 2)
        criteria = [colours[0], shapes[0], colours[1], shapes[1]][: spec.half]
        lowest = int(rng.integers(1, 2 * spec.grid - 2))
        numbers = range(lowest, lowest + 4)
        return cls(spec, criteria, arrange(rng, spec, numbers, numbers))

    @property
    def question(self) -> str:
        """Question and options."""
        orders = ", then ".join(self._order(name) for name in self.criteria)
        return f"{orders.capitalize()}. How many shapes remain? {list_options(self.options)}"

    def scenes(self, rng: np.random.Generator, right: int) -> list[Scene]:
        """The full picture, then what each deletion leaves."""
        remain, grid = self.options[right], self.spec.grid
        total = int(rng.integers(max(self.options) + len(self.criteria), grid * grid + 1))
        kinds = [self._deleted_by(step) for step in range(len(self.criteria))]
        steps = [*range(len(kinds)), *rng.integers(len(kinds), size=total - remain - len(kinds)).tolist()]
        survivors = self._deleted_by(len(kinds))
        figures = [pick(rng, survivors) for _ in range(remain)] + [pick(rng, kinds[step]) for step in steps]
        places = some(rng, all_cells(grid), total)
        scenes = [Scene(grid, grid, dict(zip(places, figures, strict=True)), is_shaded=self.spec.shaded)]
        for name in self.criteria:
            left = {place: figure for place, figure in scenes[-1].figures.items() if name not in figure}
            scenes.append(scenes[-1].keep(left))
        return scenes

    def rationale(self, scenes: list[Scene]) -> list[str]:
        """Deletion by deletion, each with the first shape that goes, whose kind does not tell how many go."""
        texts = []
        for name, before, after in zip(self.criteria, scenes, scenes[1:], strict=False):
            first = min(place for place in before.figures if place not in after.figures)
            texts.append(f"{self._order(name).capitalize()}, first the {before.figures[first]}.")
        return texts

    def _deleted_by(self, step: int) -> list[Figure]:
        """Kinds of figures that stay until deletion `step` takes them; after the last step, the survivors."""
        left = [figure for figure in all_figures(self.spec) if not set(figure) & set(self.criteria[:step])]
        return [figure for figure in left if step == len(self.criteria) or self.criteria[step] in figure]

    def _order(self, name: str) -> str:
        return f"delete every {name} shape" if name in self.spec.colour_names else f"delete every {name}"
