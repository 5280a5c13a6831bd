"""What the operations of the demo task have in common.

An operation is a class that holds what its words say. The words are drawn without regard to the answer; `scenes` then
draws pictures such that option number `right` is the answer. The rationale may say what is seen in the pictures, but
only what is seen as often with any other answer: text alone tells nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

import numpy as np

from ilvr_ds.demo.task.scene import Figure, Place, Scene
from ilvr_ds.demo.task.spec import TaskSpec

LETTERS = "ABCD"
FILLED = 0.5
"""Share of otherwise blank cells that hold a shape which the question does not ask about."""

T = TypeVar("T")


class Words(Protocol):
    """The text of a sample, and how to draw pictures for it."""

    @property
    def question(self) -> str:
        """Question and options."""

    @property
    def options(self) -> Sequence[object]:
        """The four options, each with a text; none where the rationale is the answer."""

    def scenes(self, rng: np.random.Generator, right: int) -> list[Scene]:
        """The input picture, then the helper pictures, for which option `right` (0 to 3) is the answer."""

    def rationale(self, scenes: list[Scene]) -> list[str]:
        """One text step before each helper picture of `scenes`, or one alone that is the answer."""


def list_options(options: Sequence[object]) -> str:
    """The four options as text, lettered."""
    return " ".join(f"{letter}) {option}" for letter, option in zip(LETTERS, options, strict=True))


def locate(place: Place) -> str:
    """A cell in words."""
    return f"row {place[0] + 1}, column {place[1] + 1}"


def arrange(rng: np.random.Generator, spec: TaskSpec, options: Sequence[T], order: Sequence[T]) -> list[T]:
    """The options shuffled, or in their `order` where the spec has shuffled_options off."""
    return some(rng, options, len(options)) if spec.shuffled_options else sorted(options, key=list(order).index)


def all_cells(side: int) -> list[Place]:
    """Every cell of a square grid."""
    return [(row, column) for row in range(side) for column in range(side)]


def all_figures(spec: TaskSpec) -> list[Figure]:
    """Every coloured shape in use."""
    return [Figure(colour, shape) for colour in spec.colour_names for shape in spec.shape_names]


def pick(rng: np.random.Generator, items: Sequence[T]) -> T:
    """One item, each as likely as the others."""
    return items[int(rng.integers(len(items)))]


def some(rng: np.random.Generator, items: Sequence[T], count: int) -> list[T]:
    """`count` different items in random order."""
    return [items[number] for number in rng.permutation(len(items))[:count].tolist()]
