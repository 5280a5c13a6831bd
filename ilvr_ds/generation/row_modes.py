"""The mode of each row while it answers: in text, or some way into a segment of latents, or done.

All of it stands on the device and is changed in place, so that a step can be recorded: no value is looked at, and no
number of Python's is copied to the device (`torch.where` would; `masked_fill` does not).

B rows, T prompt tokens, K latent steps of a segment.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ilvr_ds.data.tokens import SpecialTokens

Barred = Literal["image", "prompt", "image_for_words"]
"""What is out of sight. image: the input images, prompt: the images and all words of the prompt, both for everything
after a row's first segment; image_for_words: the images, for all words after the first latent_start, while latents
still see them. What was read before stays: its states may have carried away what they saw."""


def never_drawn(special: SpecialTokens, forbidden: tuple[int, ...]) -> tuple[int, ...]:
    """Tokens that no row draws: those of latents, which come by themselves inside a segment, and `forbidden`."""
    latent = (special.latent_pad, special.latent_end) if special.has_latents else ()
    return tuple(sorted({*latent, *forbidden}))


class Place(NamedTuple):
    """Where each row stands: number of its current segment and of its latent step, both [B] int64 from 0."""

    segment: Tensor
    slot: Tensor


@dataclass
class RowModes:
    """Of B rows."""

    special: SpecialTokens
    stop_ids: Tensor
    """Tokens that end an answer"""
    steps: Tensor
    """[1] int64: K"""
    left: Tensor
    """[B] int64. -1 in text, n > 0: latent steps to go, 0: latent_end is due"""
    segment: Tensor
    """[B] int64"""
    finished: Tensor
    """[B] bool"""

    @staticmethod
    def start(
        special: SpecialTokens, stop_ids: tuple[int, ...], rows: int, steps: int, device: torch.device
    ) -> RowModes:
        """All rows in text."""
        before = torch.full((rows,), -1, dtype=torch.int64, device=device)
        return RowModes(
            special,
            torch.tensor(stop_ids, dtype=torch.int64, device=device),
            torch.tensor([steps], device=device),
            before,
            before.clone(),
            torch.zeros(rows, dtype=torch.bool, device=device),
        )

    def first(self, rows: int) -> RowModes:
        """The first rows alone; changing them changes these."""
        parts = (self.left, self.segment, self.finished)
        return RowModes(self.special, self.stop_ids, self.steps, *(part[:rows] for part in parts))

    def advance(self, chosen: Tensor) -> Tensor:
        """The tokens [B] that are emitted where `chosen` are the tokens drawn as if every row were in text."""
        special, in_text = self.special, self.left < 0
        tokens = chosen.masked_fill(self.finished, special.pad)
        tokens = tokens.masked_fill(self.left == 0, special.latent_end).masked_fill(self.left > 0, special.latent_pad)
        opens = in_text & ~self.finished & (tokens == special.latent_start)
        self.segment.add_(opens)
        self.left.copy_(torch.where(opens, self.steps, (self.left - 1).clamp(min=-1)))
        self.finished.logical_or_(in_text & (tokens[:, None] == self.stop_ids).any(1))
        return tokens

    def place(self) -> Place:
        """Of the token that was just emitted."""
        return Place(self.segment, self.steps - 1 - self.left)

    def is_barred(self, barred: Barred) -> Tensor:
        """[B]: whether the token that was just emitted reads without what is barred."""
        in_text, begun = self.left < 0, self.segment >= 0
        return begun & (in_text if barred == "image_for_words" else in_text | (self.segment > 0))
