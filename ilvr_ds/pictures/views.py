"""A sample as the pictures show it: plain arrays.

Letters: K latent slots, R x C merged patches of a helper image.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Cell = tuple[int, int]
LONGEST_SIDE = 448
"""Images are shown at most this large, in pixels."""


def pixels_of(image: Image.Image) -> NDArray[np.uint8]:
    """[H, W, 3] of an image, at most LONGEST_SIDE long; shrinks the image itself."""
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    return np.asarray(image)


@dataclass(frozen=True)
class Selection:
    """What was picked for a segment."""

    score: NDArray[np.float32]
    """[R, C] of each candidate, on every patch that it averages; NaN where there is none"""
    cells: tuple[tuple[Cell, ...], ...]
    """Patches of each kept candidate, in order of selection."""
    pool: frozenset[Cell] | None = None
    """Patches of the candidates to choose from; None: all"""
    score_name: str = "cosine to the query"


@dataclass(frozen=True)
class SegmentView:
    """One latent segment."""

    text: str
    """The reasoning between the previous segment and this one."""
    helper: NDArray[np.uint8]
    """[H, W, 3]"""
    latents: NDArray[np.float32]
    """[K, R, C] cosine of the student's latent at each slot to each candidate; NaN where there is none"""
    selection: Selection | None = None
    """None where nothing is selected."""
    name: str = ""
    """What `helper` is where it is no helper image."""


@dataclass(frozen=True)
class SampleView:
    """One sample."""

    id: str
    kind: str
    """Kind of task."""
    question: str
    answer: str
    inputs: tuple[NDArray[np.uint8], ...]
    """Input images, each [H, W, 3]."""
    segments: tuple[SegmentView, ...]
