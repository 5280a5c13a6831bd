"""Do the latents matter? The same evaluation with something else in their place, and what it changes.

Conditions: the model's own states (generated), zeros, gaussian noise of the same norm, the latents of another sample,
the pad token's embedding, and segments skipped, so that latent_end follows latent_start at once.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ilvr_ds.evaluation.answers import Answer
from ilvr_ds.evaluation.generate import LatentSource, Place
from ilvr_ds.evaluation.loading import Reasoner
from ilvr_ds.ops.noise import gaussian_noise

Condition = Literal["zeros", "noise", "other_sample", "pad_embedding", "skipped"]
CONDITIONS: tuple[Condition, ...] = get_args(Condition)
BOOTSTRAP_SAMPLES = 10_000


class _Full:
    """A source that fills all steps of a segment."""

    def steps(self, latent_size: int) -> int:
        """All of them."""
        return latent_size


class Constant(_Full):
    """The same row [D] at every step: zeros, or the pad token's embedding."""

    def __init__(self, row: Tensor) -> None:
        self.row = row

    def __call__(self, hidden: Tensor, place: Place) -> Tensor:
        """The row for everybody."""
        return self.row.to(hidden).expand_as(hidden)


class Skipped:
    """No latent step at all."""

    def steps(self, latent_size: int) -> int:
        """None."""
        return 0

    def __call__(self, hidden: Tensor, place: Place) -> Tensor:
        """Never used."""
        return hidden


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


class OtherSample(_Full):
    """The latents that other samples of the batch generated: each row takes those of the next row that has any.

    Segments beyond the donor's start again at its first. A row without a donor keeps its own states.
    """

    def __init__(self, answers: Sequence[Answer], latent_size: int, device: torch.device) -> None:
        whole = [[x for x in answer.latents if len(x) == latent_size] for answer in answers]
        self.has_donor: list[bool] = []
        banks: list[list[Tensor]] = []
        for row in range(len(answers)):
            others = [whole[(row + n) % len(answers)] for n in range(1, len(answers))]
            donor = next((latents for latents in others if latents), [])
            self.has_donor.append(bool(donor))
            banks.append(donor)
        width = next((latents[0].shape[1] for latents in banks if latents), 1)
        self.bank = torch.zeros(len(answers), max(map(len, banks), default=0) or 1, latent_size, width)
        for row, latents in enumerate(banks):
            if latents:
                self.bank[row, : len(latents)] = torch.stack(latents)
        self.bank = self.bank.to(device)
        self.counts = torch.tensor([max(1, len(latents)) for latents in banks], device=device)
        self.known = torch.tensor(self.has_donor, device=device)[:, None]

    def __call__(self, hidden: Tensor, place: Place) -> Tensor:
        """The donors' latents [B, D]."""
        rows = torch.arange(len(hidden), device=hidden.device)
        segment = place.segment.clamp(min=0) % self.counts
        donated = self.bank[rows, segment, place.slot.clamp(0, self.bank.shape[2] - 1)]
        return torch.where(self.known, donated.to(hidden.dtype), hidden)


def latent_source(condition: Condition, reasoner: Reasoner, generated: Sequence[Answer], seed: int) -> LatentSource:
    """What stands in for the latents of a batch whose answers with its own latents (kept) are `generated`."""
    embeddings = reasoner.model.get_input_embeddings().weight
    pad = embeddings[reasoner.special.latent_pad].detach()
    if condition == "skipped":
        return Skipped()
    if condition == "noise":
        return Noise([answer.id for answer in generated], seed, reasoner.device)
    if condition == "other_sample":
        return OtherSample(generated, reasoner.latent_size, reasoner.device)
    return Constant(pad if condition == "pad_embedding" else torch.zeros_like(pad))


@dataclass(frozen=True)
class Effect:
    """A condition's accuracy, and its difference to the accuracy with the model's own latents."""

    accuracy: float
    difference: float
    low: float
    high: float

    def to_dict(self) -> dict[str, Any]:
        """The numbers; `interval_95` is the confidence interval of the difference."""
        return {
            "accuracy": self.accuracy,
            "difference": self.difference,
            "interval_95": [self.low, self.high],
        }


def effect(own: Sequence[bool], other: Sequence[bool], seed: int = 0) -> Effect:
    """Compare verdicts on the same samples; the 95 % interval is a paired percentile bootstrap over samples."""
    deltas = np.asarray(other, dtype=np.float64) - np.asarray(own, dtype=np.float64)
    rng = np.random.default_rng(seed)
    # a resample of n paired differences from {-1, 0, 1} is a multinomial draw of how often each value comes
    shares = np.array([(deltas == value).mean() for value in (-1, 0, 1)])
    counts = rng.multinomial(len(deltas), shares, size=BOOTSTRAP_SAMPLES)
    means = (counts[:, 2] - counts[:, 0]) / len(deltas)
    low, high = np.quantile(means, [0.025, 0.975])
    return Effect(float(np.mean(other)), float(deltas.mean()), float(low), float(high))
