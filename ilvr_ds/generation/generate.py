"""Generation with latents on a stock model: a decode loop over its forward with a KV cache.

Each row of a batch has its own mode. In text it draws tokens; after latent_start its own last hidden state is fed back
for K steps (the emitted tokens are latent_pad), then latent_end is emitted and text goes on. Outside a segment
latent_pad and latent_end are never drawn. Modes live on the device: whether all rows have finished is asked every
`CHECK_EVERY` tokens only, and what a row says never depends on the rows beside it.

B rows, T prompt tokens (padded on the left), D hidden size, K latent steps of a segment.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from ilvr_ds.data.template import EncodedSample
from ilvr_ds.generation.answers import Answer, AnswerReader
from ilvr_ds.generation.context import Context
from ilvr_ds.generation.loading import Reasoner
from ilvr_ds.generation.sampling import choose_tokens, uniform_numbers

CHECK_EVERY = 16
"""Tokens between two looks at finished rows on a GPU; each look waits for the device. On a CPU it is 1."""


@dataclass(frozen=True)
class GenerationSettings:
    """How to generate. `forced` (number of the new token, from 0, to its id) and `forbidden` steer tests."""

    max_new_tokens: int = 1024
    """Limit of all emitted tokens, latent ones included."""
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    """Texts after which an answer ends; they stay in it."""
    keep_latents: bool = False
    forced: Mapping[int, int] = field(default_factory=dict)
    forbidden: tuple[int, ...] = ()


@dataclass(frozen=True)
class Speed:
    """Tokens and seconds of prefill (prompts, images included) and of decoding (all rows, latent steps included)."""

    prefill_tokens: int = 0
    prefill_s: float = 0.0
    decode_tokens: int = 0
    decode_s: float = 0.0

    def __add__(self, other: Speed) -> Speed:
        return Speed(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    def to_dict(self) -> dict[str, float]:
        """The numbers, with tokens per second."""
        rates = {
            "prefill_tokens_per_s": self.prefill_tokens / max(self.prefill_s, 1e-9),
            "decode_tokens_per_s": self.decode_tokens / max(self.decode_s, 1e-9),
        }
        return {**{name: getattr(self, name) for name in self.__dataclass_fields__}, **rates}


class Place(NamedTuple):
    """Where each row stands: number of its current segment and of its latent step, both [B] int64 from 0."""

    segment: Tensor
    slot: Tensor


class LatentSource(Protocol):
    """What is fed back in a segment; ablation.py has others than the model's own states."""

    def steps(self, latent_size: int) -> int:
        """Latent steps of a segment."""

    def __call__(self, hidden: Tensor, place: Place) -> Tensor:
        """The latents [B, D] of rows whose last hidden states are `hidden` [B, D]; others' rows are not used."""


class OwnStates:
    """The model's own last hidden states."""

    def steps(self, latent_size: int) -> int:
        """All of them."""
        return latent_size

    def __call__(self, hidden: Tensor, place: Place) -> Tensor:
        """As they are."""
        return hidden


Barred = Literal["image", "prompt", "image_for_words"]
"""What is out of sight. image: the input images, prompt: the images and all words of the prompt, both for everything
after a row's first segment; image_for_words: the images, for all words after the first latent_start, while latents
still see them. What was read before stays: its states may have carried away what they saw."""


class Generated(NamedTuple):
    """Answers of a batch, in its order, and how fast they came."""

    answers: list[Answer]
    speed: Speed

    def summary(self) -> str:
        """What happened, in a line."""
        steps = [str(count) for answer in self.answers for count in answer.steps]
        ran = f"{len(steps)} latent segments ({', '.join(steps)} steps)" if steps else "no latent segment"
        limit = ", at the token limit" if any(answer.hit_limit for answer in self.answers) else ""
        rates = self.speed.to_dict()
        return (
            f"{ran}; {self.speed.decode_tokens} tokens{limit}; "
            f"prefill {rates['prefill_tokens_per_s']:.0f}, decode {rates['decode_tokens_per_s']:.1f} tokens a second"
        )


@dataclass
class _Modes:
    """The mode of each row, all [B] on the device."""

    reasoner: Reasoner
    steps: int
    left: Tensor
    """-1 in text, n > 0: latent steps to go, 0: latent_end is due"""
    segment: Tensor
    finished: Tensor
    stop_ids: Tensor

    @staticmethod
    def start(reasoner: Reasoner, rows: int, steps: int) -> _Modes:
        zeros = torch.zeros(rows, dtype=torch.int64, device=reasoner.device)
        stop_ids = torch.tensor(reasoner.stop_ids, device=reasoner.device)
        return _Modes(reasoner, steps, zeros - 1, zeros - 1, zeros.bool(), stop_ids)

    def advance(self, chosen: Tensor) -> Tensor:
        """The tokens [B] that are emitted where `chosen` are the tokens drawn as if every row were in text."""
        special, in_text = self.reasoner.special, self.left < 0
        chosen = torch.where(self.finished, special.pad, chosen)
        tokens = torch.where(self.left > 0, special.latent_pad, torch.where(in_text, chosen, special.latent_end))
        opens = in_text & ~self.finished & (tokens == special.latent_start)
        self.segment = self.segment + opens
        self.left = torch.where(opens, self.steps, (self.left - 1).clamp(min=-1))
        self.finished = self.finished | (in_text & torch.isin(tokens, self.stop_ids))
        return tokens

    def place(self) -> Place:
        """Of the token that was just emitted."""
        return Place(self.segment, self.steps - 1 - self.left)

    def is_barred(self, barred: Barred) -> Tensor:
        """[B]: whether the token that was just emitted reads without what is barred."""
        is_later = (self.segment > 0) if barred != "image_for_words" else torch.zeros_like(self.finished)
        return (self.segment >= 0) & ((self.left < 0) | is_later)


class Generator:
    """Answers batches of prompts.

    on_text(row, piece) gets the text of each row as it comes, which makes the loop look at every token. barred: what
    later tokens cannot see. is_over says, where ranks must stay in step, whether all have ended when this one has.
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
        latent = [reasoner.special.latent_pad, reasoner.special.latent_end] if reasoner.special.has_latents else []
        never = [*latent, *settings.forbidden]
        self.never = torch.tensor(sorted(set(never)), dtype=torch.int64, device=reasoner.device)

    @torch.inference_mode()
    def __call__(self, prompts: list[EncodedSample], shared: Context | None = None) -> Generated:
        """Generate an answer to each prompt.

        shared: a context of these prompts, with room for `max_new_tokens`, that several answers go on from.
        """
        return self.generate(prompts, shared)

    @torch.no_grad()
    def generate(self, prompts: list[EncodedSample], shared: Context | None = None) -> Generated:
        """The same with weights that are trained: what ZeRO gathers in inference mode could not be differentiated."""
        reasoner, settings = self.reasoner, self.settings
        started = time.perf_counter()
        context = shared.fork() if shared else Context(reasoner, prompts, settings.max_new_tokens)
        hidden = context.prefill()
        prefilled = reasoner.now()
        modes = _Modes.start(reasoner, len(prompts), self.latents.steps(reasoner.latent_size))
        reader = AnswerReader(reasoner, [p.id for p in prompts], settings.stop, settings.max_new_tokens, self.on_text)
        uniform = self._uniform([p.id for p in prompts])
        every = 1 if self.on_text or reasoner.device.type == "cpu" else CHECK_EVERY
        for number in range(settings.max_new_tokens):
            tokens = modes.advance(self._draw(hidden, number, uniform))
            latents = self.latents(hidden, modes.place())
            reader.take(tokens, latents if settings.keep_latents else None)
            last = number + 1 == settings.max_new_tokens
            if last or (number + 1) % every == 0:
                stopped = reader.look()
                if last or self.is_over(all(stopped)):
                    break
                modes.finished = modes.finished | torch.tensor(stopped, device=reasoner.device)
            hidden = context.step(tokens, latents, self._out_of_sight(context, modes))
        answers = reader.answers()
        decoded = reasoner.now()
        speed = Speed(
            sum(len(p.input_ids) for p in prompts), prefilled - started,
            sum(len(a.tokens) for a in answers), decoded - prefilled,
        )  # fmt: skip
        return Generated(answers, speed)

    def _draw(self, hidden: Tensor, number: int, uniform: Tensor | None) -> Tensor:
        """The next token [B] of each row, as if it were in text."""
        if number in self.settings.forced:
            return torch.full((len(hidden),), self.settings.forced[number], device=hidden.device)
        logits = self.reasoner.model.lm_head(hidden).index_fill(-1, self.never, -torch.inf)
        now = None if uniform is None else uniform[number]
        return choose_tokens(logits, self.settings.temperature, self.settings.top_p, now)

    def _out_of_sight(self, context: Context, modes: _Modes) -> Tensor | None:
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
