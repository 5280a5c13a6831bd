"""Draws what was selected in each helper image, and where each of the student's latents looks.

Letters: M segments, K latent slots, R x C merged patches of a helper image.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ilvr_ds.pictures.page import LINE, WIDTH, Page, Pixels, coloured, fitted, limits, wrapped
from ilvr_ds.pictures.style import SMALL
from ilvr_ds.pictures.views import Cell, SampleView, SegmentView

MAX_SEGMENTS = 6
MAX_SLOTS = 8
EDGE, GAP, TITLE = 14, 12, 20
"""Pixels: around the page, between panels, of a line above a panel."""
INPUT = 240
"""Longest side of an input image."""


def draw_selection(view: SampleView, step: int, path: Path) -> None:
    """Question and input images; below, for each segment, the text so far, the helper image with the selected patches
    outlined and numbered, and every patch's score, pale outside the pool."""
    shown = [segment for segment in view.segments[:MAX_SEGMENTS] if segment.selection]
    helpers = [fitted(segment.helper, 250, 250) for segment in shown]
    columns = (EDGE, 420, 420 + 250 + GAP)
    header, heights = _header_height(view), [TITLE + max(len(h), 6 * LINE) + GAP for h in helpers]
    page = Page(header + sum(heights) + EDGE)
    _header(page, view, f"step {step}: what was selected")
    top, text = header, ""
    for number, (segment, helper, height) in enumerate(zip(shown, helpers, heights, strict=True)):
        assert segment.selection is not None
        text += segment.text
        page.words(columns[0], top, f"Text before segment {number + 1} of {len(view.segments)}:")
        page.words(columns[0], top + TITLE, wrapped(text.strip(), 50, (height - TITLE - GAP) // LINE))
        text += f" [segment {number + 1}] "
        page.words(columns[1], top, "helper image, selected patches")
        in_pool = segment.selection.pool
        score, name = segment.selection.score, segment.selection.score_name
        page.words(columns[2], top, name if in_pool is None else f"{name}, pale: not in the pool")
        low, high = limits(score)
        heat = _enlarged(_faded(coloured(score, low, high), in_pool), helper)
        marks = _numbered(segment.selection.cells)
        for x, pixels in zip(columns[1:], (helper, heat), strict=True):
            page.image(x, top + TITLE, pixels)
            _outline(page, x, top + TITLE, pixels, score.shape, marks)
        page.scale(columns[2] + helper.shape[1] + 8, top + TITLE, len(helper), low, high)
        top += height
    page.save(path)


def draw_latents(view: SampleView, step: int | None, path: Path) -> None:
    """Question and input images; below, for each segment, the text before it, the helper image, and a map for each
    latent slot: the cosine of the student's latent there to every patch, in one colour scale for all.

    Outlined in each map, and numbered in the helper image: the patch that is the slot's target; where none is selected,
    the patch closest to the latent. step None: of a model that is done."""
    shown = view.segments[:MAX_SEGMENTS]
    slots = min(MAX_SLOTS, max((len(segment.latents) for segment in shown), default=0))
    helpers = [fitted(segment.helper, 170, 200) for segment in shown]
    first, side = 462, 116
    maps = [fitted(segment.helper, side, side) for segment in shown]
    rows = -(-slots // 4)
    heights = [
        max(TITLE + len(helper), rows * (TITLE + len(small)), 8 * LINE) + GAP
        for helper, small in zip(helpers, maps, strict=True)
    ]
    header = _header_height(view)
    page = Page(header + sum(heights) + EDGE)
    low, high = limits(np.concatenate([segment.latents[:slots].ravel() for segment in shown]))
    has_targets = all(segment.selection for segment in shown)
    marked = "its target" if has_targets else "the patch that it is closest to"
    when = "" if step is None else f"step {step}: "
    _header(page, view, f"{when}where each latent looks (cosine to each patch; outlined: {marked})")
    page.scale(WIDTH - 50, header + TITLE, 100, low, high)
    top = header
    for number, (segment, helper, small, height) in enumerate(zip(shown, helpers, maps, heights, strict=True)):
        page.words(EDGE, top, f"Text before segment {number + 1} of {len(view.segments)}:")
        page.words(EDGE, top + TITLE, wrapped(segment.text.strip(), 31, (height - TITLE - GAP) // LINE))
        cells = _cells_of_slots(segment)[:slots]
        page.words(270, top, segment.name or f"helper image {number + 1}")
        page.image(270, top + TITLE, helper)
        _outline(page, 270, top + TITLE, helper, segment.latents.shape[1:], _numbered(cells))
        for slot, values in enumerate(segment.latents[:slots]):
            x, y = first + slot % 4 * (side + 6), top + slot // 4 * (TITLE + len(small))
            page.words(x, y, _caption(segment, slot, cells), SMALL)
            page.image(x, y + TITLE, _enlarged(coloured(values, low, high), small))
            _outline(page, x, y + TITLE, small, values.shape, dict.fromkeys(cells[slot], ""))
        top += height
    page.save(path)


def _header_height(view: SampleView) -> int:
    images = [fitted(image, INPUT, INPUT) for image in view.inputs[:2]]
    return EDGE + TITLE + max([8 * LINE, *(TITLE + len(image) for image in images)]) + GAP


def _header(page: Page, view: SampleView, title: str) -> None:
    """Name, title, question and the first two input images."""
    page.words(EDGE, EDGE, f"{view.id} · {view.kind or 'no type'} · {title}")
    lines = (_header_height(view) - EDGE - TITLE - GAP) // LINE
    page.words(EDGE, EDGE + TITLE + 4, wrapped(view.question, 50, lines))
    x = 420
    for number, image in enumerate(view.inputs[:2]):
        page.words(x, EDGE + TITLE + 4, f"input image {number + 1} of {len(view.inputs)}")
        page.image(x, EDGE + 2 * TITLE + 4, fitted(image, INPUT, INPUT))
        x += 250 + GAP


def _cells_of_slots(segment: SegmentView) -> list[tuple[Cell, ...]]:
    """For each latent slot the patches of its target; where none is selected, those closest to it."""
    if segment.selection:
        return [*segment.selection.cells, *[()] * (len(segment.latents) - len(segment.selection.cells))]
    return [_largest(values) for values in segment.latents]


def _largest(values: NDArray[np.float32]) -> tuple[Cell, ...]:
    """Where a map is largest: all patches of a candidate that averages several."""
    if not np.isfinite(values).any():
        return ()
    return tuple((int(r), int(c)) for r, c in np.argwhere(values == np.nanmax(values)))


def _caption(segment: SegmentView, slot: int, cells: Sequence[tuple[Cell, ...]]) -> str:
    if not cells[slot]:
        return f"latent {slot + 1}: no target" if segment.selection else f"latent {slot + 1}"
    return f"latent {slot + 1}: {segment.latents[slot][cells[slot][0]]:.2f}"


def _numbered(cells: Sequence[tuple[Cell, ...]]) -> dict[Cell, str]:
    """Each outlined patch with its numbers: those of the groups that it is the first patch of."""
    marks: dict[Cell, list[str]] = {}
    for number, group in enumerate(cells, start=1):
        for cell in group:
            marks.setdefault(cell, [])
        if group:
            marks[group[0]].append(str(number))
    return {cell: ",".join(numbers) for cell, numbers in marks.items()}


def _enlarged(pixels: Pixels, like: Pixels) -> Pixels:
    """A map [R, C, 3] enlarged to the size of the image that it maps."""
    height, width = like.shape[:2]
    r, c = (np.arange(n) * size // n for n, size in ((height, len(pixels)), (width, pixels.shape[1])))
    enlarged: Pixels = pixels[r][:, c]
    return enlarged


def _faded(pixels: Pixels, pool: frozenset[Cell] | None) -> Pixels:
    """A map [R, C, 3], nearly white outside the pool."""
    if pool is None:
        return pixels
    outside = np.array([[(r, c) not in pool for c in range(pixels.shape[1])] for r in range(len(pixels))])
    faded: Pixels = np.where(outside[..., None], 255 - (255 - pixels) // 5, pixels).astype(np.uint8)
    return faded


def _outline(page: Page, x: int, y: int, image: Pixels, grid: tuple[int, ...], marks: dict[Cell, str]) -> None:
    """Outline patches of an image of `grid` rows and columns, with their numbers on top of all outlines."""
    height, width = image.shape[0] / grid[0], image.shape[1] / grid[1]
    for r, c in marks:
        page.box(x + c * width, y + r * height, width, height)
    for (r, c), text in marks.items():
        if text:
            page.mark(x + (c + 0.5) * width, y + (r + 0.5) * height, text, min(height, width))
