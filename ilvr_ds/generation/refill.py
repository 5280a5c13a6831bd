"""Answers of any number of prompts, by a decoder with few rows: a row that has ended is given the next prompt.

Which prompts stand beside each other, and when, changes no token of an answer in float32; in 16 bit, matrix products of
other sizes round otherwise.

Letters: R rows that there are, B rows of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count, islice

import torch

from ilvr_ds.data.template import EncodedSample
from ilvr_ds.generation.answers import Answer, RowReader
from ilvr_ds.generation.decoder import Decoder, Program
from ilvr_ds.generation.latent_sources import LatentSource, OwnStates
from ilvr_ds.generation.prefill import Prefilled, in_passes, read_prompts
from ilvr_ds.generation.row_modes import Barred, never_drawn
from ilvr_ds.generation.row_state import LOOK_EVERY
from ilvr_ds.generation.sampling import LEAST, uniform_numbers
from ilvr_ds.generation.settings import GenerationSettings, Speed

ROOM = 1024
"""New tokens for which there is room from the start."""


@dataclass(frozen=True)
class Request:
    """A prompt, and how many tokens its answer may have."""

    prompt: EncodedSample
    limit: int

    @property
    def room(self) -> int:
        """Columns that are reserved for it; the few answers that are longer get more when they need them."""
        return len(self.prompt.input_ids) + min(self.limit, ROOM)


@dataclass
class _Row:
    """One that is taken."""

    number: int
    """Of the request"""
    reader: RowReader
    length: int
    """Columns in use, at most"""


@dataclass
class Refill:
    """Answers requests with `decoder`.

    latents: what is fed in segments; what is not the model's own state is made for the requests in their order, which
    must then all fit into the rows. on_text(number, piece) gets the text of each answer as it comes. is_over: asked at
    each look whether to stop there, with whether all have ended.
    """

    decoder: Decoder
    settings: GenerationSettings
    latents: LatentSource = field(default_factory=OwnStates)
    on_text: Callable[[int, str], None] | None = None
    barred: Barred | None = None
    is_over: Callable[[bool], bool] = bool
    look_every: int = LOOK_EVERY
    speed: Speed = field(default_factory=Speed)
    """Of all that was answered so far"""

    def __call__(self, requests: Iterable[Request], rows: int) -> Iterator[tuple[int, Answer]]:
        """The number and the answer of each request, as they end."""
        waiting = iter(requests)
        return self.of_queue(lambda count: list(islice(waiting, count)), rows)

    @torch.inference_mode()
    def of_queue(self, take: Callable[[int], list[Request]], rows: int) -> Iterator[tuple[int, Answer]]:
        """The same for a queue: `take` gives at most so many of those that wait now; it is asked at every look, and
        where nothing is being answered and it gives nothing, this ends."""
        with self.decoder.lock:
            yield from _Run(self, take, rows)()

    @torch.inference_mode()
    def of_prefilled(self, requests: Sequence[Request], prefilled: Prefilled) -> Iterator[tuple[int, Answer]]:
        """The same where the prompts have been read, and each has a row of its own."""
        run, numbered = _Run(self, lambda count: [], len(requests)), list(enumerate(requests))
        with self.decoder.lock:
            run.begin(numbered)
            run.admit(numbered, list(range(len(requests))), prefilled)
            yield from run()

    @property
    def program(self) -> Program:
        """What the steps are."""
        settings = self.settings
        return Program(
            is_sampled=settings.temperature > 0,
            never=never_drawn(self.decoder.reasoner.special, settings.forbidden),
            forced=tuple(sorted(settings.forced.items())),
            barred=self.barred,
        )


class _Run:
    """One call."""

    def __init__(self, refill: Refill, take: Callable[[int], list[Request]], rows: int) -> None:
        self.refill, self.decoder, self.settings = refill, refill.decoder, refill.settings
        self.reasoner = refill.decoder.reasoner
        self.take = take
        self.numbers = count()
        self.next: list[tuple[int, Request]] = []
        """Taken from those that wait, but not into a row yet"""
        self.rows: list[_Row | None] = [None] * rows
        self.is_own = isinstance(refill.latents, OwnStates)

    def __call__(self) -> Iterator[tuple[int, Answer]]:
        while self._refill():
            yield from self._until_a_look()
            if self.refill.is_over(not any(self.rows) and not self._peek()):
                break
        yield from self._left()

    def begin(self, first: list[tuple[int, Request]]) -> None:
        """Room for these at least, and nothing in any row."""
        state = self.decoder.reserve(len(self.rows), max(request.room for _, request in first), keeps=False)
        state.end(torch.arange(len(state.length), device=self.reasoner.device))
        state.modes.steps.fill_(self.refill.latents.steps(self.reasoner.latent_size))
        state.temperature.fill_(max(self.settings.temperature, LEAST))
        state.top_p.fill_(max(self.settings.top_p, LEAST))
        state.tick.zero_()

    def admit(self, requests: list[tuple[int, Request]], places: list[int], prefilled: Prefilled) -> None:
        """Put prompts that were read into the rows `places`."""
        state, device = self.decoder.state, self.reasoner.device
        at = torch.tensor(places, device=device)
        for (keys, values), held in zip(prefilled.keys_and_values, self.decoder.held, strict=True):
            held[0, :, : prefilled.columns].index_copy_(0, at, keys)
            held[1, :, : prefilled.columns].index_copy_(0, at, values)
        limits = torch.tensor([request.limit for _, request in requests], device=device)
        nothing = torch.zeros_like(limits)
        for part, values in (
            (state.hidden, prefilled.hidden), (state.length, prefilled.lengths), (state.position, prefilled.position),
            (state.count, nothing), (state.limit, limits), (state.modes.left, nothing - 1),
            (state.modes.segment, nothing - 1), (state.modes.finished, nothing.bool()),
        ):  # fmt: skip
            part.index_copy_(0, at, values)
        if self.refill.barred is not None:
            barred = prefilled.prompt if self.refill.barred == "prompt" else prefilled.image
            state.barred.index_fill_(0, at, False)
            state.barred[:, : prefilled.columns].index_copy_(0, at, barred)
        for (number, request), place in zip(requests, places, strict=True):
            self.rows[place] = _Row(number, self._reader(number, request), len(request.prompt.input_ids))
        self._draw_numbers(places)

    def _draw_numbers(self, places: list[int]) -> None:
        """Those by which the tokens of rows are sampled, for as many as there are columns."""
        if self.settings.temperature == 0 or not places:
            return
        uniform = self.decoder.state.uniform
        ids = [row.reader.id for row in map(self.rows.__getitem__, places) if row]
        numbers = uniform_numbers(ids, self.settings.seed, uniform.shape[1])
        at = torch.tensor(places, device=uniform.device)
        uniform.index_copy_(0, at, numbers.T.to(uniform.device))

    def _reserve(self, columns: int) -> None:
        """More columns for rows in use, if that is more."""
        if columns > self.decoder.columns:
            self.decoder.reserve(len(self.rows), columns)
            self._draw_numbers([place for place, row in enumerate(self.rows) if row])

    def _refill(self) -> bool:
        """Give free rows the next prompts; False: nothing is left to do."""
        free = [place for place, row in enumerate(self.rows) if row is None]
        taken = self._take(len(free))
        if taken and len(free) == len(self.rows):
            self.begin(taken)
        elif taken:
            self._reserve(max(request.room for _, request in taken))
        started = self.reasoner.now()
        for members in in_passes([request.prompt for _, request in taken]):
            group = [taken[member] for member in members]
            read = read_prompts(self.reasoner, [request.prompt for _, request in group])
            self.admit(group, [free[member] for member in members], read)
        if taken:
            tokens = sum(len(request.prompt.input_ids) for _, request in taken)
            self.refill.speed += Speed(tokens, self.reasoner.now() - started)
        return any(self.rows)

    def _take(self, most: int) -> list[tuple[int, Request]]:
        """The next requests, as many as there are."""
        taken, self.next = self.next, []
        return [*taken, *((next(self.numbers), request) for request in self.take(most - len(taken)))]

    def _peek(self) -> bool:
        """Whether any prompt still waits."""
        self.next = self._take(1)
        return bool(self.next)

    def _until_a_look(self) -> Iterator[tuple[int, Answer]]:
        started = self.reasoner.now()
        taken = [(place, row) for place, row in enumerate(self.rows) if row]
        left = max(row.reader.limit - len(row.reader.tokens) for _, row in taken)
        steps = min(self.refill.look_every, LOOK_EVERY, left)
        rows = self._step(steps, taken)
        state = self.decoder.state
        tokens = state.emitted[:steps, :rows].T.tolist()
        fed = state.fed[:steps, :rows].transpose(0, 1).cpu() if self.settings.keep_latents else None
        state.tick.zero_()
        over = []
        decoded = 0
        for place, row in enumerate(self.rows):
            if row is None:
                continue
            known = len(row.reader.tokens)
            row.reader.read(tokens[place], None if fed is None else fed[place])
            decoded += len(row.reader.tokens) - known
            row.length += steps
            if row.reader.is_over:
                over.append(place)
        if over:
            state.end(torch.tensor(over, device=self.reasoner.device))
        self.refill.speed += Speed(0, 0.0, decoded, self.reasoner.now() - started)
        for place in over:
            yield self._taken_out(place)

    def _step(self, steps: int, taken: list[tuple[int, _Row]]) -> int:
        """Run steps; how many rows took part."""
        rows = self._together(taken)
        columns = max(row.length for _, row in taken) + steps
        if columns > self.decoder.columns:
            self._reserve(columns + ROOM)
        parts = self.decoder.parts(rows, columns, self.refill.program)
        for _ in range(steps):
            if self.is_own:
                parts.whole()
            else:
                parts.choose()
                self._make_latents()
                parts.read()
        return rows

    def _make_latents(self) -> None:
        state = self.decoder.state.first(len(self.rows))
        state.latents.copy_(self.refill.latents(state.hidden, state.modes.place()))

    def _together(self, taken: list[tuple[int, _Row]]) -> int:
        """Rows of a step that the rows in use fit into, once those that stand behind them have moved to the front."""
        rows = min(1 << (len(taken) - 1).bit_length(), len(self.rows)) if self.is_own else len(self.rows)
        behind = [place for place, _ in taken if place >= rows]
        if behind:
            free = [place for place in range(rows) if self.rows[place] is None][: len(behind)]
            self.decoder.move(behind, free)
            for source, target in zip(behind, free, strict=True):
                self.rows[source], self.rows[target] = None, self.rows[source]
        return rows

    def _left(self) -> Iterator[tuple[int, Answer]]:
        """What is not whole where `is_over` said so."""
        for place, row in enumerate(self.rows):
            if row is not None:
                yield self._taken_out(place)
        for number, request in self.next:
            yield number, self._reader(number, request).answer(self.settings.keep_latents)

    def _taken_out(self, place: int) -> tuple[int, Answer]:
        row = self.rows[place]
        assert row is not None
        self.rows[place] = None
        return row.number, row.reader.answer(self.settings.keep_latents)

    def _reader(self, number: int, request: Request) -> RowReader:
        show = partial(self.refill.on_text, number) if self.refill.on_text else None
        return RowReader(self.reasoner, request.prompt.id, self.settings.stop, request.limit, show)
