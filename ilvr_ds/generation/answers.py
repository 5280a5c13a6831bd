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


class RowReader:
    """Reads the tokens of one row as they come: where it ends, and what it says.

    show gets the text piece by piece.
    """

    def __init__(
        self, reasoner: Reasoner, id: str, stop: tuple[str, ...], limit: int, show: Callable[[str], None] | None = None
    ) -> None:
        self.reasoner = reasoner
        self.id = id
        self.stop = stop
        self.limit = limit
        self.show = show
        self.tokens: list[int] = []
        self.is_ended = False
        """By a stop token or a stop string"""
        self._fed: dict[int, Tensor] = {}
        """[D] by the place of its latent_pad"""
        self._shown = 0

    @property
    def is_over(self) -> bool:
        """Whether no more tokens are read: it has ended, or is at its limit."""
        return self.is_ended or len(self.tokens) >= self.limit

    def read(self, new: list[int], fed: Tensor | None = None) -> None:
        """Read tokens; what a row emits after its end does not count. fed [new, D], on the CPU: what was fed at each,
        where latents are to be kept."""
        if self.is_over:
            return
        tokens, known = self.tokens, len(self.tokens)
        new = new[: self.limit - known]
        end = next((i for i, token in enumerate(new) if token in self.reasoner.stop_ids), None)
        tokens += new if end is None else new[: end + 1]
        stops = self._has_stop(tokens)
        if stops:  # the shortest run of tokens that holds a stop string: it does not depend on when we look
            del tokens[bisect_left(range(len(tokens)), True, lo=known, key=lambda n: self._has_stop(tokens[:n])) :]
        self.is_ended = stops or end is not None
        if fed is not None:
            at = [n for n in range(known, len(tokens)) if tokens[n] == self.reasoner.special.latent_pad]
            self._fed |= {n: fed[n - known].clone() for n in at}
        if self.show:
            self._show(self.show)

    def answer(self, keeps_latents: bool) -> Answer:
        """The answer as far as it was read."""
        special = self.reasoner.special
        places: list[list[int]] = []
        for position, token in enumerate(self.tokens):
            if token == special.latent_start:
                places.append([])
            elif token == special.latent_pad:
                places[-1].append(position)
        return Answer(
            id=self.id,
            text=self._until_stop(self._text(self.tokens)),
            tokens=list(self.tokens),
            steps=tuple(map(len, places)),
            hit_limit=not self.is_ended,
            latents=tuple(map(self._latents, places)) if keeps_latents else (),
        )

    def _latents(self, places: list[int]) -> Tensor:
        weight = self.reasoner.model.get_input_embeddings().weight
        none = torch.empty(0, weight.shape[1], dtype=weight.dtype)
        return torch.cat([none, *(self._fed[at][None] for at in places)])

    def _has_stop(self, tokens: list[int]) -> bool:
        if not self.stop:
            return False
        text = self._text(tokens).rstrip("\ufffd")  # half a letter, which the next token may complete
        return any(word in text for word in self.stop)

    def _until_stop(self, text: str) -> str:
        """Up to the end of the first stop string in it."""
        return text[: min((text.index(word) + len(word) for word in self.stop if word in text), default=len(text))]

    def _text(self, tokens: list[int]) -> str:
        return str(self.reasoner.encoder.tokenizer.decode(tokens, skip_special_tokens=True))

    def _show(self, show: Callable[[str], None]) -> None:
        text = self._until_stop(self._text(self.tokens)).rstrip("\ufffd")  # a letter of several tokens is not whole yet
        if piece := text[self._shown :]:
            show(piece)
            self._shown = len(text)


class AnswerReader:
    """Collects the tokens of a batch on the device and reads them on the host when asked to look."""

    def __init__(self, rows: list[RowReader], keeps_latents: bool) -> None:
        self.rows = rows
        self.keeps_latents = keeps_latents
        self._unread: list[Tensor] = []
        self._fed: list[Tensor] = []

    def take(self, tokens: Tensor, latents: Tensor) -> None:
        """Note one token [B] and the latent [B, D] of each row; does not wait for the device."""
        self._unread.append(tokens)
        if self.keeps_latents:
            self._fed.append(latents)

    def look(self) -> list[bool]:
        """Which rows have ended; waits for the device."""
        columns = torch.stack(self._unread, dim=1).tolist()
        fed = torch.stack(self._fed, dim=1).cpu() if self.keeps_latents else None
        self._unread, self._fed = [], []
        for number, (row, new) in enumerate(zip(self.rows, columns, strict=True)):
            row.read(new, None if fed is None else fed[number])
        return [row.is_ended for row in self.rows]

    def answers(self) -> list[Answer]:
        """The answers as far as they were read."""
        return [row.answer(self.keeps_latents) for row in self.rows]
