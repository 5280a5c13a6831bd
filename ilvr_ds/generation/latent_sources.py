"""What can be fed in a segment in place of the model's own last hidden states.

B rows, K latent steps of a segment, D hidden size.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ilvr_ds.generation.answers import Answer
from ilvr_ds.generation.row_modes import Place
from ilvr_ds.ops.noise import gaussian_noise


class LatentSource(Protocol):
    """What is fed back in a segment; below are others than the model's own states."""

    def steps(self, latent_size: int) -> int:
        """Latent steps of a segment."""

    def __call__(self, hidden: Tensor, place: Place) -> Tensor:
        """The latents [B, D] of rows whose last hidden states are `hidden` [B, D]; others' rows are not used."""


class _Full:
    """A source that fills all steps of a segment."""

    def steps(self, latent_size: int) -> int:
        """All of them."""
        return latent_size


class OwnStates(_Full):
    """The model's own last hidden states."""

    def __call__(self, hidden: Tensor, place: Place) -> Tensor:
        """As they are."""
        return hidden


class Constant(_Full):
    """The same row [D] at every step: zeros, or the pad token's embedding."""

    def __init__(self, row: Tensor) -> None:
        self.row = row

    def __call__(self, hidden: Tensor, place: Place) -> Tensor:
        """The row for everybody."""
        return self.row.to(hidden).expand_as(hidden)


class Markers(OwnStates):
    """No latent step at all: latent_end follows latent_start at once."""

    def steps(self, latent_size: int) -> int:
        """None."""
        return 0


class Noise(_Full):
    """Gaussian directions with the norm of the state that they replace; they depend on id, segment and step alone."""

    def __init__(self, ids: Sequence[str], seed: int, device: torch.device) -> None:
        self.seed = seed
        self.rows = torch.tensor([zlib.crc32(name.encode()) for name in ids], device=device)

    def __call__(self, hidden: Tensor, place: Place) -> Tensor:
        """Noise [B, D]."""
        stream = torch.stack([self.rows, (place.segment << 16) + place.slot.clamp(min=0)], dim=1)
        noise = gaussian_noise(self.seed, 0, stream, hidden.shape[1])
        scale = hidden.float().norm(dim=1, keepdim=True) / noise.norm(dim=1, keepdim=True)
        latents: Tensor = (noise * scale).to(hidden.dtype)
        return latents


class HalfOwn(OwnStates):
    """The model's own states for half of the slots of each segment."""

    def steps(self, latent_size: int) -> int:
        """The smaller half, at least one."""
        return max(1, latent_size // 2)


class FirstRepeated(_Full):
    """The first latent of each segment at all of its slots."""

    def __init__(self) -> None:
        self.first: Tensor | None = None

    def __call__(self, hidden: Tensor, place: Place) -> Tensor:
        """[B, D]"""
        self.first = hidden if self.first is None else torch.where((place.slot == 0)[:, None], hidden, self.first)
        return torch.where((place.slot > 0)[:, None], self.first, hidden)


class Given(_Full):
    """Latents that are given: for each row those of its segments, each [K, D].

    Segments beyond the last start again at the first. A row without any keeps its own states.
    """

    def __init__(self, banks: Sequence[Sequence[Tensor]], latent_size: int, device: torch.device) -> None:
        self.has_donor = [bool(latents) for latents in banks]
        found = next((latents[0] for latents in banks if latents), torch.zeros(1, 1))
        most = max(map(len, banks), default=0) or 1
        self.bank = torch.zeros(len(banks), most, latent_size, found.shape[1], dtype=found.dtype)
        for row, latents in enumerate(banks):
            if latents:
                self.bank[row, : len(latents)] = torch.stack(list(latents))
        self.bank = self.bank.to(device)
        self.counts = torch.tensor([max(1, len(latents)) for latents in banks], device=device)
        self.known = torch.tensor(self.has_donor, device=device)[:, None]

    def __call__(self, hidden: Tensor, place: Place) -> Tensor:
        """The donors' latents [B, D]."""
        rows = torch.arange(len(hidden), device=hidden.device)
        segment = place.segment.clamp(min=0) % self.counts
        donated = self.bank[rows, segment, place.slot.clamp(0, self.bank.shape[2] - 1)]
        return torch.where(self.known, donated.to(hidden.dtype), hidden)


class OtherSample(Given):
    """The latents that other samples of the batch generated: each row takes those of the next row that has any."""

    def __init__(self, answers: Sequence[Answer], latent_size: int, device: torch.device) -> None:
        whole = [whole_segments(answer, latent_size) for answer in answers]
        banks = []
        for row in range(len(answers)):
            others = [whole[(row + n) % len(answers)] for n in range(1, len(answers))]
            banks.append(next((latents for latents in others if latents), []))
        super().__init__(banks, latent_size, device)


def whole_segments(answer: Answer, latent_size: int) -> list[Tensor]:
    """The latents of segments that the token limit did not cut."""
    return [latents for latents in answer.latents if len(latents) == latent_size]
