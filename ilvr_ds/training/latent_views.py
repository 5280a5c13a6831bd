"""What is selected and the student's latents resemble in a few fixed samples, as plain arrays for pictures.

Letters: M segments, K latent slots, N candidates, D features, R x C merged patches of a helper image.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ilvr_ds import dist
from ilvr_ds.data.decode import decode_image
from ilvr_ds.data.loader import WindowDataset
from ilvr_ds.data.sample import SampleError, texts_before_latents
from ilvr_ds.data.window import Window
from ilvr_ds.errors import UserError
from ilvr_ds.pictures.views import SampleView, SegmentView, Selection, pixels_of
from ilvr_ds.training.step import LatentProbe, TrainingStep

logger = logging.getLogger("ilvr_ds")


class LatentViews:
    """Views of the samples `numbers`; a window of `dataset` is one micro-batch of them, with helper images."""

    def __init__(self, dataset: WindowDataset, numbers: NDArray[np.int64], step: TrainingStep) -> None:
        self.dataset = dataset
        self.numbers = numbers
        self.step = step
        self._window: Window | None = None

    @torch.no_grad()
    def __call__(self) -> list[SampleView]:
        """The current views (collective): on the main rank; an empty list on the others.

        Samples that cannot be read, and those without a segment, are left out.
        """
        self._window = self._window or self.dataset.window([self.numbers])
        student: Any = self.step.student
        student.eval()
        prepared = self.step.prepare(self._window.to(dist.device()))
        probe = self.step.probe(prepared.window.micro_batches[0], prepared)
        student.train()
        if not dist.is_main():
            return []
        bad = {sample.number for sample in self._window.bad}
        segments = _Segments(self._window, probe)
        rows = [row for row, number in enumerate(self.numbers) if number not in bad]
        views = []
        for row in rows:
            try:
                views.append(self._view(row, segments))
            except (UserError, SampleError) as error:  # read again, and not by the other ranks
                logger.warning("no picture of sample %d: %s", self.numbers[row], error)
        return [view for view in views if view.segments]

    def _view(self, row: int, segments: _Segments) -> SampleView:
        sample = self.dataset.reader.read(int(self.numbers[row]))
        texts = texts_before_latents(sample)
        helpers = [self.dataset.encoder.images.seen(data) for data in sample.helper_images]
        cell = self.dataset.encoder.images.cell
        views = [
            segments.view(number, texts[m], helpers[m], (helpers[m].height // cell, helpers[m].width // cell))
            for m, number in enumerate(segments.of_sample(row))
        ]
        inputs = tuple(pixels_of(decode_image(data)) for data in sample.input_images)
        return SampleView(sample.id, sample.group, sample.question, sample.answer, inputs, tuple(views))


class _Segments:
    """Segments of a window that is one micro-batch, on the host."""

    def __init__(self, window: Window, probe: LatentProbe) -> None:
        [micro] = window.micro_batches
        self.owner = list(zip(micro.sample_of_segment.tolist(), micro.noise_keys[:, 1].tolist(), strict=True))
        self.offsets = window.candidates.offsets.tolist()
        self.rows, self.weights = window.candidates.rows.numpy(), window.candidates.weights.numpy()
        self.candidates, self.latents = _unit(probe.candidates), _unit(probe.latents)
        targets = probe.targets
        self.indices = targets.indices.cpu().tolist() if targets else None
        pool = targets.pool if targets else None
        self.members = pool.members.cpu().tolist() if pool else None
        self.change = pool.change.cpu() if pool and pool.change is not None else None
        self.query = _unit(targets.query) if targets and targets.query is not None else None

    def of_sample(self, row: int) -> list[int]:
        """Numbers of a sample's segments in their order."""
        mine = [(m, number) for number, (owner, m) in enumerate(self.owner) if owner == row]
        return [number for _, number in sorted(mine)]

    def view(self, number: int, text: str, helper: Image.Image, grid: tuple[int, int]) -> SegmentView:
        """A segment whose helper image has `grid` rows and columns of merged patches."""
        first, last = self.offsets[number], self.offsets[number + 1]
        start = self.rows[first, 0]
        patches = [self.rows[n][self.weights[n] > 0] - start for n in range(first, last)]
        candidates = self.candidates[first:last]
        latents = _map(self.latents[number] @ candidates.T, patches, grid)
        if self.indices is None:
            return SegmentView(text, pixels_of(helper), latents)
        score = _map(self._score(number)[None], patches, grid)[0]
        kept = [index - first for index in self.indices[number] if index >= 0]
        cells = [tuple((int(p) // grid[1], int(p) % grid[1]) for p in run) for run in patches]
        pool = None
        if self.members is not None:
            pool = frozenset(cell for n, run in enumerate(cells) if self.members[first + n] for cell in run)
        name = "change" if self.query is None else "cosine to the query"
        selection = Selection(score, tuple(cells[n] for n in kept), pool, name)
        return SegmentView(text, pixels_of(helper), latents, selection)

    def _score(self, number: int) -> Tensor:
        """Of a segment's candidates [P]: cosine to the query or, where none is asked for, how much they changed."""
        here = slice(self.offsets[number], self.offsets[number + 1])
        if self.query is not None:
            return self.candidates[here] @ self.query[number]
        assert self.change is not None, "change alone decides"
        return self.change[here]


def _unit(rows: Tensor) -> Tensor:
    """Rows of length 1 on the host, in float32."""
    return torch.nn.functional.normalize(rows.float(), dim=-1).cpu()


def _map(cosine: Tensor, patches: list[NDArray[np.int64]], grid: tuple[int, int]) -> NDArray[np.float32]:
    """[X, R, C]: values [X, N] of candidates at the `patches` that each is the mean of; NaN at the others."""
    flat = np.full((len(cosine), grid[0] * grid[1]), np.nan, dtype=np.float32)
    for n, values in enumerate(cosine.T.numpy()):
        flat[:, patches[n]] = values[:, None]
    return flat.reshape(len(cosine), *grid)
