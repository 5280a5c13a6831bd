"""What the teacher selected in each helper image, and where each latent of the student looks.

Letters: M segments, K latent slots, R x C merged patches of a helper image.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from ilvr_ds.pictures.style import (
    COLOURS,
    DPI,
    HEAT,
    NORMAL,
    SMALL,
    WIDTH_IN,
    new_figure,
    place,
    save,
    show_image,
    write_text,
)  # fmt: skip
from ilvr_ds.pictures.views import SampleView, SegmentView

MAX_SEGMENTS = 6
MAX_SLOTS = 8


def draw_selection(view: SampleView, step: int, path: Path) -> None:
    """Question and input images; below, for each segment, the text so far, the helper image with the selected patches
    outlined and numbered, and the cosine of every patch to the teacher's query."""
    shown = view.segments[:MAX_SEGMENTS]
    figure = new_figure(2.6 * (1 + len(shown)))
    rows = figure.subplots(1 + len(shown), 3, width_ratios=[1.5, 1, 1], squeeze=False)
    place(figure, 0.05, 0.7, 0.25, 0.1, 0.2, 0.3)
    write_text(rows[0, 0], f"{view.id} · {view.kind or 'no type'} · step {step}\n\n{view.question}", 52, 14)
    for axes, number in zip(rows[0, 1:], range(2), strict=True):
        if number < len(view.inputs):
            show_image(axes, view.inputs[number], f"input image {number + 1} of {len(view.inputs)}")
        else:
            axes.set_axis_off()
    text = ""
    for number, (segment, (left, middle, right)) in enumerate(zip(shown, rows[1:], strict=True)):
        text += segment.text
        write_text(left, f"Text before segment {number + 1} of {len(view.segments)}:\n{text.strip()}", 52, 14)
        text += f" [segment {number + 1}] "
        show_image(middle, segment.helper, "helper image, selected patches")
        _outline(middle, segment, _cell_size(segment))
        extent = (0.0, float(segment.helper.shape[1]), float(segment.helper.shape[0]), 0.0)
        heat = right.imshow(segment.cosine, cmap=HEAT, extent=extent, interpolation="nearest")
        show_ticks_off(right, "cosine to the teacher's query")
        _outline(right, segment, _cell_size(segment))
        bar = figure.colorbar(heat, cax=right.inset_axes((1.04, 0.0, 0.05, 1.0)))
        bar.ax.tick_params(labelsize=SMALL)
    save(figure, path)


def draw_latents(view: SampleView, step: int, path: Path) -> None:
    """One row for each segment, one map for each latent slot: the cosine of what the student foresees to every patch.
    The patch that the teacher picked for the slot is outlined. One colour scale for all."""
    shown = view.segments[:MAX_SEGMENTS]
    slots = min(MAX_SLOTS, max((len(segment.latents) for segment in shown), default=1))
    shapes = [segment.latents.shape[1:] for segment in shown]
    tallest = max((rows / columns for rows, columns in shapes), default=1.0)
    side = min(2.6, (WIDTH_IN - 1.2) / slots - 0.15)
    figure = new_figure((side * min(tallest, 1.5) + 0.3) * len(shown) + 0.7)
    rows = figure.subplots(len(shown), slots, squeeze=False)
    place(figure, 0.35, 0.85, 0.65, 0.3, 0.15, 0.3)
    values = np.concatenate([segment.latents[:slots].ravel() for segment in shown])
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    heat = None
    for number, (segment, row) in enumerate(zip(shown, rows, strict=True)):
        for slot, axes in enumerate(row):
            heat = axes.imshow(segment.latents[slot], cmap=HEAT, vmin=low, vmax=high, interpolation="nearest")
            has_target = slot < len(segment.selected)
            show_ticks_off(axes, _cosine_to_target(segment, slot) if has_target else "no target", SMALL)
            if has_target:
                for r, c in segment.selected[slot]:
                    _box(axes, c - 0.5, r - 0.5, 1.0, 1.0)
            if slot == 0:
                axes.set_ylabel(f"segment {number + 1}", fontsize=NORMAL)
            if number == len(shown) - 1:
                axes.set_xlabel(f"latent {slot + 1}", fontsize=NORMAL)
    more = f"; the first {slots} of {len(shown[0].latents)} latents" if len(shown[0].latents) > slots else ""
    title = f"Where each latent looks: {view.id}, step {step} (cosine to the patches; outlined: its target{more})"
    figure.text(0.5, 1 - 0.25 / figure.get_size_inches()[1], title, fontsize=NORMAL, ha="center", parse_math=False)
    if heat is not None:
        width, height = figure.get_size_inches()
        bar = figure.colorbar(
            heat, cax=figure.add_axes((1 - 0.7 / width, 0.3 / height, 0.15 / width, 1 - 0.95 / height))
        )
        bar.ax.tick_params(labelsize=SMALL)
    save(figure, path)


def show_ticks_off(axes: Axes, title: str, size: float = NORMAL) -> None:
    """A title and no ticks."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title, fontsize=size)


def _cosine_to_target(segment: SegmentView, slot: int) -> str:
    return f"target: {segment.latents[slot][segment.selected[slot][0]]:.2f}"


def _cell_size(segment: SegmentView) -> tuple[float, float]:
    rows, columns = segment.cosine.shape
    height, width = segment.helper.shape[:2]
    return height / rows, width / columns


def _outline(axes: Axes, segment: SegmentView, cell: tuple[float, float]) -> None:
    height, width = cell
    points = min(NORMAL, 0.35 * width * axes.get_window_extent().width / segment.helper.shape[1] * 72 / DPI)
    for number, cells in enumerate(segment.selected):
        for r, c in cells:
            _box(axes, c * width, r * height, width, height)
        r, c = cells[0]
        label = axes.text(
            c * width + width / 2, r * height + height / 2, str(number + 1), ha="center", va="center",
            fontsize=max(6.0, points), color="white", fontweight="bold",
        )  # fmt: skip
        label.set_bbox({"facecolor": "black", "alpha": 0.65, "pad": 1.0, "edgecolor": "none"})


def _box(axes: Axes, x: float, y: float, width: float, height: float) -> None:
    """An outline that shows on dark and on light: white below, vermilion on top."""
    axes.add_patch(Rectangle((x, y), width, height, fill=False, edgecolor="white", linewidth=3.5, clip_on=False))
    axes.add_patch(Rectangle((x, y), width, height, fill=False, edgecolor=COLOURS[3], linewidth=2, clip_on=False))
