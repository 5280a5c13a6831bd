"""The common look: headless, notebook width, colours that colour-blind readers can tell apart."""

from __future__ import annotations

import warnings
from pathlib import Path

from matplotlib.figure import Figure

from ilvr_ds.pictures.fonts import choose_fonts
from ilvr_ds.whole_files import whole_file

WIDTH_IN, DPI = 10.0, 100
"""1,000 pixels, the width of a notebook cell."""
HEAT = "cividis"
"""Perceptually uniform, and the same to colour-blind readers."""
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
"""Okabe and Ito's palette without yellow, which is faint on white."""
LINES = ("-", "--", "-.", ":")
SMALL, NORMAL = 8.0, 9.5
"""Points."""


def new_figure(height_in: float) -> Figure:
    """A figure of the common width; without pyplot, so that any thread may draw.

    The caller places the panels: a layout engine would draw everything several times, and take most of the time.
    """
    return Figure(figsize=(WIDTH_IN, height_in), dpi=DPI)


def place(figure: Figure, left: float, right: float, top: float, bottom: float) -> None:
    """Set the margins of a figure with one panel, in inches."""
    width, height = (float(side) for side in figure.get_size_inches())
    figure.subplots_adjust(left=left / width, right=1 - right / width, top=1 - top / height, bottom=bottom / height)


def save(figure: Figure, path: Path) -> None:
    """Write a PNG atomically, with installed fonts that have its letters (fonts.py)."""
    choose_fonts(figure)
    with whole_file(path) as partial, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(partial, format="png", pil_kwargs={"compress_level": 3})
