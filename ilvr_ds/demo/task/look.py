"""Look: say what a picture shows. Questions about cells, and captions, without helper pictures.

Such samples teach a random model to see before it learns to reason: what stands in a cell, what is marked, how many
there are of a kind, where a figure is. A caption lists cells by their places, in the words of the questions; it has no
options and no answer beside its text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ilvr_ds.demo.task.scene import Figure, Place, Scene
from ilvr_ds.demo.task.spec import TaskSpec
from ilvr_ds.demo.task.words import FILLED, all_cells, all_figures, arrange, list_options, locate, pick, some

_Draw = Callable[[np.random.Generator, int], Scene]


@dataclass(frozen=True)
class Look:
    """A question about one picture, or the order to describe it."""

    ask: str
    options: Sequence[object]
    draw_scene: _Draw
    """The picture for which option `right` is the answer"""
    rows: Sequence[int] = ()
    """Of a caption: what it describes"""

    @classmethod
    def draw(cls, rng: np.random.Generator, spec: TaskSpec) -> Look:
        """Draw a caption or, as likely, a question of any kind: a caption says much more of what there is to see."""
        kind = _caption if rng.random() < 0.5 else pick(rng, _QUESTIONS)
        return kind(rng, spec)

    @property
    def question(self) -> str:
        """Question and options."""
        return f"{self.ask} {list_options(self.options)}" if self.options else self.ask

    def scenes(self, rng: np.random.Generator, right: int) -> list[Scene]:
        """The picture."""
        return [self.draw_scene(rng, right)]

    def rationale(self, scenes: list[Scene]) -> list[str]:
        """Of a caption its text; of a question nothing, for it would give the answer away."""
        return [] if self.options else [_describe(scenes[0], self.rows)]


def _figure(rng: np.random.Generator, spec: TaskSpec) -> Look:
    """The figure in a cell. All four options are in the picture, once each."""
    place, options = pick(rng, all_cells(spec.grid)), _four_figures(rng, spec)
    return Look(
        f"What stands in {locate(place)}?", options, lambda rng, right: _with_options(rng, spec, place, options, right)
    )


def _marked(rng: np.random.Generator, spec: TaskSpec) -> Look:
    """The figure in the marked cell. All four options are in the picture, once each."""
    options = _four_figures(rng, spec)

    def draw(rng: np.random.Generator, right: int) -> Scene:
        place = pick(rng, all_cells(spec.grid))
        return _with_options(rng, spec, place, options, right, marked=place)

    return Look("What stands in the marked cell?", options, draw)


def _colour(rng: np.random.Generator, spec: TaskSpec) -> Look:
    """The colour of the shape in a cell."""
    place = pick(rng, all_cells(spec.grid))
    options = arrange(rng, spec, some(rng, spec.colour_names, 4), spec.colour_names)

    def draw(rng: np.random.Generator, right: int) -> Scene:
        shown = Figure(options[right], pick(rng, spec.shape_names))
        return _filled(rng, spec, {place: shown}, all_figures(spec))

    return Look(f"What colour is the shape in {locate(place)}?", options, draw)


def _count(rng: np.random.Generator, spec: TaskSpec) -> Look:
    """How many there are of a colour or a shape. How many shapes there are in all does not depend on it."""
    name = pick(rng, [*spec.colour_names, *spec.shape_names])
    lowest = int(rng.integers(spec.grid))
    numbers = range(lowest, lowest + 4)
    options = arrange(rng, spec, numbers, numbers)
    counted = [figure for figure in all_figures(spec) if name in figure]
    others = [figure for figure in all_figures(spec) if name not in figure]

    def draw(rng: np.random.Generator, right: int) -> Scene:
        total = int(rng.integers(max(options), spec.grid**2 + 1))
        kinds = [counted] * options[right] + [others] * (total - options[right])
        places = some(rng, all_cells(spec.grid), total)
        return _scene(spec, {place: pick(rng, kind) for place, kind in zip(places, kinds, strict=True)})

    what = f"{name} shape" if name in spec.colour_names else name
    return Look(f"Count every {what}. How many are there?", options, draw)


def _where(rng: np.random.Generator, spec: TaskSpec) -> Look:
    """The cell of a figure. Something else stands in the cells of the other options."""
    figure, cells = pick(rng, all_figures(spec)), all_cells(spec.grid)
    places = arrange(rng, spec, some(rng, cells, 4), cells)
    others = [other for other in all_figures(spec) if other != figure]

    def draw(rng: np.random.Generator, right: int) -> Scene:
        shown = {place: pick(rng, others) for place in places}
        return _filled(rng, spec, shown | {places[right]: figure}, others)

    return Look(f"Where is the {figure}?", [locate(place) for place in places], draw)


def _caption(rng: np.random.Generator, spec: TaskSpec) -> Look:
    """All cells of a picture of 4 x 4, or one row of a larger one. It may have a mark."""
    rows = range(spec.grid) if spec.grid == 4 else [int(rng.integers(spec.grid))]
    what = "the image" if len(rows) > 1 else f"row {rows[0] + 1} of the image"

    def draw(rng: np.random.Generator, right: int) -> Scene:
        marked = pick(rng, all_cells(spec.grid)) if rng.random() < 0.5 else None
        return _filled(rng, spec, {}, all_figures(spec), marked)

    return Look(f"Describe {what} cell by cell.", (), draw, rows)


_QUESTIONS: tuple[Callable[[np.random.Generator, TaskSpec], Look], ...] = (_figure, _marked, _colour, _count, _where)


def _four_figures(rng: np.random.Generator, spec: TaskSpec) -> list[Figure]:
    return arrange(rng, spec, some(rng, all_figures(spec), 4), all_figures(spec))


def _with_options(
    rng: np.random.Generator, spec: TaskSpec, place: Place, options: list[Figure], right: int,
    marked: Place | None = None,
) -> Scene:  # fmt: skip
    """Option `right` at a place, and the other options elsewhere."""
    free = some(rng, [cell for cell in all_cells(spec.grid) if cell != place], len(options) - 1)
    others = [option for option in options if option != options[right]]
    figures = {place: options[right], **dict(zip(free, others, strict=True))}
    return _filled(rng, spec, figures, [figure for figure in all_figures(spec) if figure not in options], marked)


def _filled(
    rng: np.random.Generator, spec: TaskSpec, figures: dict[Place, Figure], fillers: Sequence[Figure],
    marked: Place | None = None,
) -> Scene:  # fmt: skip
    """These figures, and in the other cells fillers or nothing."""
    blank = [cell for cell in all_cells(spec.grid) if cell not in figures]
    return _scene(spec, {**figures, **{cell: pick(rng, fillers) for cell in blank if rng.random() < FILLED}}, marked)


def _scene(spec: TaskSpec, figures: dict[Place, Figure], marked: Place | None = None) -> Scene:
    return Scene(spec.grid, spec.grid, figures, marked, is_shaded=spec.shaded)


def _describe(scene: Scene, rows: Sequence[int]) -> str:
    """The cells of these rows in words, and the mark."""
    places = [(row, column) for row in rows for column in range(scene.columns)]
    cells = "; ".join(f"{locate(place)}: {scene.figures.get(place, 'nothing')}" for place in places)
    mark = f"The marked cell is {locate(scene.marked)}." if scene.marked else "No cell is marked."
    return f"In {cells}. {mark}"
