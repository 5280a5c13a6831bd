"""From emitted tokens to answers: where a row ends, its text, its segments, its latents."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ilvr_ds.generation.loading import Reasoner


@dataclass(frozen=True)
class Answer:
    """What the model said to one prompt."""

    id: str
    text: str
    """Without special tokens."""
    tokens: list[int]
    """All emitted ids, latent ones and the one that ends the answer included."""
    steps: tuple[int, ...]
    """Latent steps of each segment."""
    hit_limit: bool
    """Neither a stop token nor a stop string came within the limit."""
    latents: tuple[Tensor, ...] = ()
    """What was fed back in each segment, [steps, D] on the CPU; empty unless they were to be kept."""

    @property
    def segments(self) -> int:
        """How many segments ran."""
        return len(self.steps)


class AnswerReader:
    """Collects the tokens of a batch on the device and reads them on the host when asked to look."""

    def __init__(
        self,
        reasoner: Reasoner,
        ids: list[str],
        stop: tuple[str, ...],
        limit: int,
        on_text: Callable[[int, str], None] | None,
    ) -> None:
        self.reasoner = reasoner
        self.ids = ids
        self.stop = stop
        self.limit = limit
        self.on_text = on_text
        self._unread: list[Tensor] = []
        self._latents: list[Tensor] = []
        self._tokens: list[list[int]] = [[] for _ in ids]
        self._ended = [False] * len(ids)
        self._shown = [0] * len(ids)

    def take(self, tokens: Tensor, latents: Tensor | None) -> None:
        """Note one token [B] and the latent [B, D] of each row; does not wait for the device."""
        self._unread.append(tokens)
        if latents is not None:
            self._latents.append(latents)

    def look(self) -> list[bool]:
        """Which rows have ended; waits for the device."""
        columns = torch.stack(self._unread, dim=1).tolist()
        self._unread = []
        for row, new in enumerate(columns):
            if not self._ended[row]:
                self._read(row, new)
        return list(self._ended)

    def answers(self) -> list[Answer]:
        """The answers as far as they were read."""
        latents = torch.stack(self._latents, dim=1).cpu() if self._latents else None
        return [self._answer(row, None if latents is None else latents[row]) for row in range(len(self.ids))]

    def _read(self, row: int, new: list[int]) -> None:
        tokens, known = self._tokens[row], len(self._tokens[row])
        end = next((i for i, token in enumerate(new) if token in self.reasoner.stop_ids), None)
        tokens += new if end is None else new[: end + 1]
        stops = self._has_stop(tokens)
        if stops:  # the shortest run of tokens that holds a stop string: it does not depend on when we look
            del tokens[bisect_left(range(len(tokens)), True, lo=known, key=lambda n: self._has_stop(tokens[:n])) :]
        self._ended[row] = stops or end is not None
        if self.on_text:
            self._show(row)

    def _has_stop(self, tokens: list[int]) -> bool:
        if not self.stop:
            return False
        text = self._text(tokens)
        return any(word in text for word in self.stop)

    def _until_stop(self, text: str) -> str:
        """Up to the end of the first stop string in it."""
        return text[: min((text.index(word) + len(word) for word in self.stop if word in text), default=len(text))]

    def _text(self, tokens: list[int]) -> str:
        return str(self.reasoner.encoder.tokenizer.decode(tokens, skip_special_tokens=True))

    def _show(self, row: int) -> None:
        text = self._until_stop(self._text(self._tokens[row]))
        if self.on_text and not text.endswith("\ufffd"):  # a letter of several tokens is not whole yet
            if piece := text[self._shown[row] :]:
                self.on_text(row, piece)
            self._shown[row] = len(text)

    def _answer(self, row: int, latents: Tensor | None) -> Answer:
        tokens, special = self._tokens[row], self.reasoner.special
        steps: list[int] = []
        places: list[list[int]] = []
        for position, token in enumerate(tokens):
            if token == special.latent_start:
                steps.append(0)
                places.append([])
            elif token == special.latent_pad:
                steps[-1] += 1
                places[-1].append(position)
        return Answer(
            id=self.ids[row],
            text=self._until_stop(self._text(tokens)),
            tokens=list(tokens),
            steps=tuple(steps),
            hit_limit=not self._ended[row],
            latents=() if latents is None else tuple(latents[at].clone() for at in places),
        )
