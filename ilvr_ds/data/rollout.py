"""Aligns the rows of a micro-batch by segment, for latents that the student makes itself (stage 2)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.nn.functional import pad

from ilvr_ds.data.template import EncodedSample
from ilvr_ds.data.tensor_tree import TensorTree


@dataclass(frozen=True)
class RolloutLayout(TensorTree):
    """A micro-batch with its samples aligned by segment, for latents that the student makes itself (stage 2).

    The U columns are chunk 0, K latent slots, chunk 1, K latent slots, ..., the last chunk. Chunk m of a row holds its
    tokens from the end of its segment m-1 up to and including the latent_start of its segment m, or up to its end; a
    row without segment m has empty columns there, behind the tokens of its chunk. X counts all segments, whether helper
    images are read or not.
    """

    source: torch.Tensor
    """[B, U] int64 flat position of the token in each column; 0 in empty columns"""
    real: torch.Tensor
    """[B, U] bool: False in empty columns"""
    place: torch.Tensor
    """[R, T] int64 column of each token; 0 on padding"""
    openings: torch.Tensor
    """[rounds, B] int64 place of latent_start within chunk m; 0 for rows without segment m"""
    turns: torch.Tensor
    """[X] int64 number of each segment in its sample"""
    rows: torch.Tensor
    """[X] int64 its row of the layout"""
    slots: torch.Tensor
    """[X, K] int64 flat positions of its latent pads"""
    image_slots: torch.Tensor
    """[image tokens] int64 flat positions of image tokens in chunk 0, [B, chunks[0]], where all images stand"""
    chunks: tuple[int, ...] = ()
    """Columns of each chunk: one more than there are rounds of latents."""

    @property
    def rounds(self) -> int:
        """Rounds of latent slots: the largest number of segments of a row, or more."""
        return len(self.chunks) - 1

    def with_rounds(self, rounds: int, latent_size: int) -> RolloutLayout:
        """The layout with empty rounds appended, so that ranks with other samples make the same number of calls."""
        more = rounds - self.rounds
        columns = more * (latent_size + 1)
        return replace(
            self,
            source=pad(self.source, (0, columns)),
            real=pad(self.real, (0, columns)),
            openings=pad(self.openings, (0, 0, 0, more)),
            chunks=self.chunks + (1,) * more,
        )


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
