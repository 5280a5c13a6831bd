"""Creation: build a picture from words, then find it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ilvr_ds.demo.task.scene import QUARTERS, Figure, Place, Scene, quarter_corner
from ilvr_ds.demo.task.spec import TaskSpec
from ilvr_ds.demo.task.words import all_cells, all_figures, arrange, list_options, locate, pick, some

_Parts = list[tuple[Place, Figure]]
_Change = tuple[int, str, str | Place]  # number of a part, attribute, new value


@dataclass(frozen=True)
class Creation:
    """Build a picture from words; which quarter of the image shows it?

    The quarters show the picture, the picture with one thing changed, with another thing changed, and with both:
    seen without the words, each of the four could be the right one.
    """

    spec: TaskSpec
    target: dict[Place, Figure]
    options: list[str]

    @classmethod
    def draw(cls, rng: np.random.Generator, spec: TaskSpec) -> Creation:
        """Draw what to build and the order of the options."""
        places = some(rng, all_cells(spec.half), spec.half)
        return cls(
            spec, {place: pick(rng, all_figures(spec)) for place in places}, arrange(rng, spec, QUARTERS, QUARTERS)
        )

    @property
    def question(self) -> str:
        """Question and options."""
        half = self.spec.half
        parts = "; ".join(self._part(place) for place in self.target)
        ask = f"Build a picture of {half} by {half} cells: {parts}. Which quarter of the image shows it?"
        return f"{ask} {list_options(self.options)}"

    def scenes(self, rng: np.random.Generator, right: int) -> list[Scene]:
        """Four candidates, then the picture as it grows."""
        half = self.spec.half
        one, other = self._changes(rng)
        parts = list(self.target.items())
        candidates = [parts, _replace(parts, one), _replace(parts, other), _replace(_replace(parts, one), other)]
        others = some(rng, [quarter for quarter in QUARTERS if quarter != self.options[right]], 3)
        shown: dict[Place, Figure] = {}
        for quarter, candidate in zip([self.options[right], *others], candidates, strict=True):
            row, column = quarter_corner(quarter, half)
            shown |= {(row + place[0], column + place[1]): figure for place, figure in candidate}
        shaded = self.spec.shaded
        growing = [Scene(half, half, dict(parts[: count + 1]), is_shaded=shaded) for count in range(len(parts))]
        return [Scene(self.spec.grid, self.spec.grid, shown, is_shaded=shaded), *growing]

    def rationale(self, scenes: list[Scene]) -> list[str]:
        """Shape by shape."""
        return [f"Add the {self._part(place)}." for place in self.target]

    def _changes(self, rng: np.random.Generator) -> list[_Change]:
        """Two changes of different attributes (colour, shape or place) of the same or different shapes."""
        half, target = self.spec.half, list(self.target.items())
        blanks = some(rng, [cell for cell in all_cells(half) if cell not in self.target], 2)
        slots = [(part, attribute) for part in range(len(target)) for attribute in ("colour", "shape", "place")]
        changes: list[_Change] = []
        for (part, attribute), blank in zip(some(rng, slots, 2), blanks, strict=True):
            if attribute == "place":
                changes.append((part, attribute, blank))
            else:
                names = self.spec.colour_names if attribute == "colour" else self.spec.shape_names
                now = getattr(target[part][1], attribute)
                changes.append((part, attribute, pick(rng, [name for name in names if name != now])))
        return changes

    def _part(self, place: Place) -> str:
        return f"{self.target[place]} in {locate(place)}"


def _replace(parts: _Parts, change: _Change) -> _Parts:
    number, attribute, value = change
    place, figure = parts[number]
    changed = (place, figure._replace(**{attribute: value})) if isinstance(value, str) else (value, figure)
    return [*parts[:number], changed, *parts[number + 1 :]]
