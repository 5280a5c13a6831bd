"""A sample as pictures show it: plain arrays.

Letters: K latent slots, R x C merged patches of a helper image.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Cell = tuple[int, int]


@dataclass(frozen=True)
class Selection:
    """What the teacher picked for a segment."""

    cosine: NDArray[np.float32]
    """[R, C] cosine of the query to each candidate, on the patches that it is the mean of; NaN where there is none"""
    cells: tuple[tuple[Cell, ...], ...]
    """Patches of each kept candidate, in the order of selection."""
    pool: frozenset[Cell] | None = None
    """Patches of the candidates among which was chosen; None: all"""


@dataclass(frozen=True)
class SegmentView:
    """One latent segment."""

    text: str
    """The reasoning between the segment before and this one."""
    helper: NDArray[np.uint8]
    """[H, W, 3]"""
    latents: NDArray[np.float32]
    """[K, R, C] cosine of what the student makes at each slot to each candidate; NaN where there is none"""
    selection: Selection | None = None
    """None without a teacher."""


@dataclass(frozen=True)
class SampleView:
    """One sample, as far as pictures show it."""

    id: str
    kind: str
    """Kind of task."""
    question: str
    answer: str
    inputs: tuple[NDArray[np.uint8], ...]
    """Input images, each [H, W, 3]."""
    segments: tuple[SegmentView, ...]
