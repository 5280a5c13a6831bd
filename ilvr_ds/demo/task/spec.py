"""How hard the demo task is."""

from __future__ import annotations

from dataclasses import dataclass

from ilvr_ds.errors import UserError, nearest

OPERATIONS = ("creation", "deletion", "update", "selection")
"""CoMT's kinds of task, drawn by default."""
ALL_OPERATIONS = (*OPERATIONS, "trail", "look")
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond", "ring", "hourglass")
COLOURS = ("red", "blue", "green", "black", "orange", "purple", "cyan", "yellow")


@dataclass(frozen=True)
class TaskSpec:
    """The difficulty of the demo task; raises UserError where a value is out of range."""

    grid: int = 4
    """Cells a side of a picture: 4, 6 or 8. A cell is 28x28 pixels."""
    shapes: int = 4
    """How many kinds of shapes there are: 3 to 8."""
    colours: int = 4
    """How many colours there are: 4 to 8."""
    shuffled_options: bool = True
    """Whether the four options are in random order; in a fixed one the letter follows without reading them."""
    operations: tuple[str, ...] = OPERATIONS
    """Which operations are drawn, in turn: of ALL_OPERATIONS."""
    signs: int = 6
    """How many signs a trail has: 1 to two fewer than there are cells."""
    named: bool = False
    """Whether the text of a trail names each figure on the way."""
    shaded: bool = False
    """Whether the background tells the place of a cell, as it always does on a trail."""

    def __post_init__(self) -> None:
        if self.grid not in (4, 6, 8):
            raise UserError(f"grid: {self.grid} cells a side; choose 4, 6 or 8")
        if not 3 <= self.shapes <= len(SHAPES):
            raise UserError(f"shapes: {self.shapes} kinds; choose 3 to {len(SHAPES)}")
        if not 4 <= self.colours <= len(COLOURS):
            raise UserError(f"colours: {self.colours} colours; choose 4 (one an option) to {len(COLOURS)}")
        if not self.operations:
            raise UserError(f"operations: none given; choose from {', '.join(ALL_OPERATIONS)}")
        for name in self.operations:
            if name not in ALL_OPERATIONS:
                raise UserError(f"operations: '{name}' is unknown{nearest(name, ALL_OPERATIONS)}")
        if len(set(self.operations)) < len(self.operations):
            raise UserError("operations: one is named twice; name each once")
        if "trail" in self.operations:
            self._check_trail()

    def _check_trail(self) -> None:
        if not self.shapes == self.colours == self.grid:
            given = f"{self.shapes} shapes, {self.colours} colours, {self.grid} cells a side"
            raise UserError(f"trail: {given}; every cell needs a sign of its own, so all three must be the same")
        if not 1 <= self.signs <= self.grid**2 - 2:
            raise UserError(f"signs: {self.signs}; choose 1 to {self.grid**2 - 2} on a grid of {self.grid}")

    @property
    def half(self) -> int:
        """Cells a side of a quarter; also the latent steps of creation, deletion and update."""
        return self.grid // 2

    @property
    def shape_names(self) -> tuple[str, ...]:
        """The shapes in use."""
        return SHAPES[: self.shapes]

    @property
    def colour_names(self) -> tuple[str, ...]:
        """The colours in use."""
        return COLOURS[: self.colours]
