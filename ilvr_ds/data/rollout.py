"""Aligns the rows of a micro-batch by segment, for latents that the student makes itself (stage 2)."""

from __future__ import annotations

import numpy as np
import torch

from ilvr_ds.data.template import EncodedSample
from ilvr_ds.data.window import RolloutLayout


def lay_out(
    samples: list[EncodedSample], base: list[int], shape: tuple[int, int], latent_size: int, image_pad: int
) -> RolloutLayout:
    """The layout of one micro-batch.

    base: flat position of each sample's first token in rows of tokens of this `shape`: one row each, padded on either
    side, or one row for all.
    """
    rounds = max(len(s.segments) for s in samples)
    bounds = [_chunk_bounds(s, latent_size) for s in samples]
    chunks = [max(b[m][1] - b[m][0] for b in bounds if m < len(b)) for m in range(rounds + 1)]
    starts = np.cumsum([0, *(c + latent_size for c in chunks)])
    B, U = len(samples), int(starts[-1]) - latent_size
    source, real = np.zeros((B, U), dtype=np.int64), np.zeros((B, U), dtype=bool)
    place = np.zeros(shape[0] * shape[1], dtype=np.int64)
    openings = np.zeros((rounds, B), dtype=np.int64)
    images = [b * chunks[0] + np.flatnonzero(s.input_ids == image_pad) for b, s in enumerate(samples)]
    for b, sample in enumerate(samples):
        columns = np.concatenate(
            [
                np.concatenate([starts[m] + np.arange(last - first), starts[m] + chunks[m] + np.arange(latent_size)])
                for m, (first, last) in enumerate(bounds[b])
            ]
        )[: len(sample.input_ids)]  # no latents behind the last chunk
        tokens = np.arange(len(sample.input_ids))
        source[b, columns] = base[b] + tokens
        real[b, columns] = True
        place[base[b] + tokens] = columns
        for m in range(len(sample.segments)):
            openings[m, b] = bounds[b][m][1] - bounds[b][m][0] - 1
    segments = [(m, b) for b, sample in enumerate(samples) for m in range(len(sample.segments))]
    pads = [base[b] + int(samples[b].segments[m]) + np.arange(latent_size) for m, b in segments]
    return RolloutLayout(
        source=torch.from_numpy(source),
        real=torch.from_numpy(real),
        place=torch.from_numpy(place.reshape(shape)),
        openings=torch.from_numpy(openings),
        turns=torch.tensor([m for m, _ in segments], dtype=torch.int64),
        rows=torch.tensor([b for _, b in segments], dtype=torch.int64),
        slots=torch.from_numpy(np.array(pads, dtype=np.int64).reshape(-1, latent_size)),
        image_slots=torch.from_numpy(np.concatenate(images)),
        chunks=tuple(chunks),
    )


def _chunk_bounds(sample: EncodedSample, latent_size: int) -> list[tuple[int, int]]:
    """First and one past the last token of each chunk of text: one more than there are segments."""
    pads = [int(first) for first in sample.segments]
    return list(zip([0, *(first + latent_size for first in pads)], [*pads, len(sample.input_ids)], strict=True))
