"""How all pictures look: headless, notebook width, colours that colour-blind readers tell apart."""

from __future__ import annotations

import textwrap
import warnings
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

WIDTH_IN, DPI = 10.0, 100
"""1,000 pixels: the width of a notebook's cell."""
HEAT = "cividis"
"""Even in lightness, the same to colour-blind readers."""
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
"""Okabe and Ito's, without yellow, which is faint on white."""
LINES = ("-", "--", "-.", ":")
SMALL, NORMAL = 8.0, 9.5
"""Points."""


def new_figure(height_in: float) -> Figure:
    """A figure of the common width; without pyplot, so that any thread may draw."""
    return Figure(figsize=(WIDTH_IN, height_in), dpi=DPI, layout="constrained")


def save(figure: Figure, path: Path) -> None:
    """Write a PNG as a whole. Characters that the font lacks become boxes without a word."""
    temporary = path.with_name(path.name + ".partial")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(temporary, format="png")
    temporary.replace(path)


def write_text(axes: Axes, text: str, columns: int, lines: int) -> None:
    """Wrapped text in an empty panel; what is longer than `lines` lines loses its beginning, where it is least news."""
    axes.set_axis_off()
    wrapped = [row for part in text.splitlines() for row in textwrap.wrap(part, columns) or [""]]
    if len(wrapped) > lines:
        wrapped = ["[...]", *wrapped[len(wrapped) - lines + 1 :]]
    axes.text(
        0, 1, "\n".join(wrapped), va="top", ha="left", fontsize=NORMAL, transform=axes.transAxes, parse_math=False
    )


def show_image(axes: Axes, image: NDArray[np.uint8], title: str) -> None:
    """An image [H, W, 3] without ticks."""
    axes.imshow(image, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title, fontsize=NORMAL, parse_math=False)
