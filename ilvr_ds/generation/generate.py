"""Generation with latents on a stock model: a decode loop over its forward with a KV cache.

Each row of a batch has its own mode. In text it draws tokens; after latent_start its own last hidden state is fed back
for K steps (the emitted tokens are latent_pad), then latent_end is emitted and text goes on. Outside a segment
latent_pad and latent_end are never drawn. Modes live on the device: whether all rows have finished is asked every
few tokens only, and what a row says never depends on the rows beside it.

B rows, T prompt tokens (padded on the left), D hidden size, K latent steps of a segment.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from ilvr_ds.data.template import EncodedSample
from ilvr_ds.errors import counted
from ilvr_ds.generation.answers import Answer, AnswerReader, RowReader
from ilvr_ds.generation.context import Context
from ilvr_ds.generation.decoder import Decoder
from ilvr_ds.generation.latent_sources import LatentSource, OwnStates
from ilvr_ds.generation.loading import Reasoner
from ilvr_ds.generation.prefill import read_already
from ilvr_ds.generation.refill import Refill, Request
from ilvr_ds.generation.row_modes import Barred, RowModes, never_drawn
from ilvr_ds.generation.row_state import LOOK_EVERY
from ilvr_ds.generation.sampling import LEAST, choose_tokens, uniform_numbers
from ilvr_ds.generation.settings import GenerationSettings, Speed

SHOW_EVERY = 4
"""Steps between two looks of a decoder where somebody reads along."""


class Generated(NamedTuple):
    """Answers of a batch, in its order, and how fast they came."""

    answers: list[Answer]
    speed: Speed

    def summary(self) -> str:
        """What happened, in a line."""
        steps = [count for answer in self.answers for count in answer.steps]
        ran = f"{counted(len(steps), 'latent segment')} ({', '.join(map(str, steps))} steps)" if steps else "no latents"
        limit = "; at the token limit" if any(answer.hit_limit for answer in self.answers) else ""
        return f"{ran}; {self.speed.in_words()}{limit}"


def in_order(answers: Iterable[tuple[int, Answer]]) -> Iterator[tuple[int, Answer]]:
    """The same by number, each as soon as all before it have come."""
    early: dict[int, Answer] = {}
    following = 0
    for number, answer in answers:
        early[number] = answer
        while following in early:
            yield following, early.pop(following)
            following += 1


class Generator:
    """Answers batches of prompts.

    on_text(row, piece) gets the text of each row as it comes, which makes the loop look at every token, and a decoder
    every few. barred: what later tokens cannot see. is_over says, where ranks must stay in step, whether all have ended
    when this one has.
    """

    def __init__(
        self,
        reasoner: Reasoner,
        settings: GenerationSettings,
        latents: LatentSource | None = None,
        on_text: Callable[[int, str], None] | None = None,
        barred: Barred | None = None,
        is_over: Callable[[bool], bool] = bool,
    ) -> None:
        self.reasoner = reasoner
        self.settings = settings
        self.is_over = is_over
        self.latents = latents or OwnStates()
        self.on_text = on_text
        self.barred = barred
        self.speed = Speed()
        """Of all that `stream` has answered so far"""
        never = never_drawn(reasoner.special, settings.forbidden)
        self.never = torch.tensor(never, dtype=torch.int64, device=reasoner.device)

    @torch.inference_mode()
    def __call__(self, prompts: list[EncodedSample], shared: Context | None = None) -> Generated:
        """Generate an answer to each prompt.

        shared: a context of these prompts, with room for `max_new_tokens`, that several answers go on from.
        """
        if self.reasoner.decoder is None:
            return self.generate(prompts, shared)
        return self._decode(self.reasoner.decoder, prompts, shared)

    def stream(self, prompts: Iterable[EncodedSample], rows: int) -> Iterator[tuple[int, Answer]]:
        """The number and the answer of each prompt as they end, `rows` at a time; prompts are asked for as rows become
        free. Without a decoder batch by batch."""
        if self.reasoner.decoder is not None:
            refill, before = self._refill(self.reasoner.decoder), self.speed
            for number, answer in refill((Request(p, self.settings.max_new_tokens) for p in prompts), rows):
                self.speed = before + refill.speed
                yield number, answer
            return
        waiting, first = iter(prompts), 0
        while batch := list(islice(waiting, rows)):
            generated = self(batch)
            self.speed += generated.speed
            yield from enumerate(generated.answers, start=first)
            first += len(batch)

    def queue(self, take: Callable[[int], list[EncodedSample]], rows: int) -> Iterator[tuple[int, Answer]]:
        """The same for prompts that come meanwhile: `take` gives at most so many of those that wait now. Without a
        decoder those of the first call are all."""
        if self.reasoner.decoder is None:
            yield from self.stream(take(rows), rows)
            return
        refill, limit = self._refill(self.reasoner.decoder), self.settings.max_new_tokens
        for number, answer in refill.of_queue(lambda most: [Request(prompt, limit) for prompt in take(most)], rows):
            self.speed = refill.speed
            yield number, answer

    def _refill(self, decoder: Decoder) -> Refill:
        every = SHOW_EVERY if self.on_text else LOOK_EVERY
        return Refill(
            decoder, self.settings, self.latents, self.on_text, self.barred, self.is_over, look_every=every
        )  # fmt: skip

    def _decode(self, decoder: Decoder, prompts: list[EncodedSample], shared: Context | None) -> Generated:
        """The same by the decoder's recorded steps, a row for each prompt."""
        refill = self._refill(decoder)
        requests = [Request(prompt, self.settings.max_new_tokens) for prompt in prompts]
        if shared:
            found = dict(refill.of_prefilled(requests, read_already(shared)))
        else:
            found = dict(refill(requests, len(requests)))
        return Generated([found[number] for number in range(len(prompts))], refill.speed)

    @torch.no_grad()
    def generate(self, prompts: list[EncodedSample], shared: Context | None = None) -> Generated:
        """The same by a plain loop, with weights that are trained too: what ZeRO gathers in inference mode could not be
        differentiated."""
        reasoner, settings = self.reasoner, self.settings
        started = time.perf_counter()
        context = shared.fork() if shared else Context(reasoner, prompts, settings.max_new_tokens)
        hidden = context.prefill()
        prefilled = reasoner.now()
        steps = self.latents.steps(reasoner.latent_size)
        modes = RowModes.start(reasoner.special, reasoner.stop_ids, len(prompts), steps, reasoner.device)
        rows = [self._row(number, prompt.id) for number, prompt in enumerate(prompts)]
        reader = AnswerReader(rows, settings.keep_latents)
        uniform = self._uniform([p.id for p in prompts])
        every = 1 if self.on_text or reasoner.device.type == "cpu" else LOOK_EVERY
        for number in range(settings.max_new_tokens):
            tokens = modes.advance(self._draw(hidden, number, uniform))
            latents = self.latents(hidden, modes.place())
            reader.take(tokens, latents)
            last = number + 1 == settings.max_new_tokens
            if last or (number + 1) % every == 0:
                stopped = reader.look()
                if last or self.is_over(all(stopped)):
                    break
                modes.finished.logical_or_(torch.tensor(stopped, device=reasoner.device))
            hidden = context.step(tokens, latents, self._out_of_sight(context, modes))
        answers = reader.answers()
        decoded = reasoner.now()
        speed = Speed(
            sum(len(p.input_ids) for p in prompts), prefilled - started,
            sum(len(a.tokens) for a in answers), decoded - prefilled,
        )  # fmt: skip
        return Generated(answers, speed)

    def _row(self, number: int, id: str) -> RowReader:
        show = partial(self.on_text, number) if self.on_text else None
        return RowReader(self.reasoner, id, self.settings.stop, self.settings.max_new_tokens, show)

    def _draw(self, hidden: Tensor, number: int, uniform: Tensor | None) -> Tensor:
        """The next token [B] of each row, as if it were in text."""
        if number in self.settings.forced:
            return torch.full((len(hidden),), self.settings.forced[number], device=hidden.device)
        logits = self.reasoner.model.lm_head(hidden).index_fill(-1, self.never, -torch.inf)
        now = None if uniform is None else uniform[number]
        temperature, top_p = (max(number, LEAST) for number in (self.settings.temperature, self.settings.top_p))
        return choose_tokens(logits, temperature, top_p, now)

    def _out_of_sight(self, context: Context, modes: RowModes) -> Tensor | None:
        """[B, T] columns of the prompts that each row's token cannot see; None: it sees all."""
        if self.barred is None:
            return None
        tokens = context.tokens
        columns = tokens.real if self.barred == "prompt" else tokens.input_ids == self.reasoner.special.image_pad
        return columns & modes.is_barred(self.barred)[:, None]

    def _uniform(self, ids: list[str]) -> Tensor | None:
        if self.settings.temperature == 0:
            return None
        return uniform_numbers(ids, self.settings.seed, self.settings.max_new_tokens).to(self.reasoner.device)
