"""The log-probability of the right answer after other latents, the words held fixed.

The sequence is the prompt, the model's own answer up to the end of its last whole segment with other latents in its
slots, and then the sample's own last words ("The final answer is: B"). Summed are the log-probabilities of the tokens
of the answer in them, in nats; of all of the last words where the answer does not stand there. Words and own latents
are those of the answer with own latents: what is fed in one segment does not change what stands in the next. So this is
a change of the latents alone, where accuracy is that of whole answers written anew.

B rows, T tokens, K latent slots of a segment, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ilvr_ds.data.answer_place import find_answer
from ilvr_ds.data.sample import LatentStep, Sample, TextStep
from ilvr_ds.data.template import EncodedSample
from ilvr_ds.generation.answers import Answer
from ilvr_ds.generation.latent_sources import LatentSource, whole_segments
from ilvr_ds.generation.loading import Reasoner
from ilvr_ds.generation.row_modes import Place
from ilvr_ds.model.injection import last_hidden, write_images


@dataclass(frozen=True)
class LastWords:
    """What follows the latents."""

    tokens: list[int]
    scored: range
    """Of the tokens"""


def last_words(reasoner: Reasoner, sample: Sample) -> LastWords:
    """The text behind a sample's last latent step; its answer alone where there is no such text."""
    last = max((n for n, step in enumerate(sample.steps) if isinstance(step, LatentStep)), default=-1)
    text = "".join(step.content for step in sample.steps[last + 1 :] if isinstance(step, TextStep)) or sample.answer
    encoded = reasoner.encoder.tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    tokens, (start, end) = list(encoded["input_ids"]), find_answer(text, sample.answer)
    inside = [n for n, (a, b) in enumerate(encoded["offset_mapping"]) if a < end and b > start]
    scored = range(inside[0], inside[-1] + 1) if start >= 0 and inside else range(len(tokens))
    return LastWords(tokens, scored)


class AnswerProbability:
    """Of a batch of samples whose prompts were answered with own latents (kept)."""

    def __init__(
        self, reasoner: Reasoner, samples: Sequence[Sample], prompts: Sequence[EncodedSample], own: Sequence[Answer]
    ) -> None:
        self.reasoner = reasoner
        self.prompts = prompts
        self.answers = own
        self.words = [last_words(reasoner, sample) for sample in samples]
        ends = [answer.tokens.count(reasoner.special.latent_end) for answer in own]
        self.own = [whole_segments(a, reasoner.latent_size)[:n] for a, n in zip(own, ends, strict=True)]
        self._features: Tensor | None = None

    @torch.inference_mode()
    def __call__(self, source: LatentSource | None) -> list[float]:
        """Nats of each row, with what `source` feeds; None: segments are left out, with their markers."""
        steps = 0 if source is None else source.steps(self.reasoner.latent_size)
        rows = [self._sequence(row, steps, source is None) for row in range(len(self.prompts))]
        window = self.reasoner.collate(rows)
        if self._features is None:  # the images are the same each time
            self._features = self.reasoner.tower(window.images[0])
        tokens, model = window.micro_batches[0].tokens, self.reasoner.model
        embeddings = model.get_input_embeddings()(tokens.input_ids)
        embeddings = write_images(embeddings, tokens, self._features)
        if source is not None and steps and any(self.own):
            fed = self._fed(source, steps)
            at = (tokens.input_ids == self.reasoner.special.latent_pad).flatten().nonzero()[:, 0]
            embeddings = embeddings.flatten(0, 1).index_copy(0, at, fed.to(embeddings.dtype)).view_as(embeddings)
        hidden = last_hidden(model.model.language_model, tokens, embeddings, features=self._features)
        return [self._score(hidden[row], row) for row in range(len(rows))]

    def _sequence(self, row: int, steps: int, without_markers: bool) -> EncodedSample:
        special, tokens = self.reasoner.special, self.answers[row].tokens
        ends = [n for n, token in enumerate(tokens) if token == special.latent_end]
        written: list[int] = []
        for token in tokens[: ends[-1] + 1] if ends else []:
            if token == special.latent_start and not without_markers:
                written += [token, *[special.latent_pad] * steps]
            elif token not in (special.latent_start, special.latent_pad) and not (
                token == special.latent_end and without_markers
            ):
                written.append(token)
        return self.prompts[row].followed_by([*written, *self.words[row].tokens])

    def _fed(self, source: LatentSource, steps: int) -> Tensor:
        """[slots of all rows, D], row by row, asked for as in generation: in each segment slot by slot."""
        device, K = self.reasoner.device, self.reasoner.latent_size
        most = max(map(len, self.own))
        width = next(latents[0] for latents in self.own if latents)
        own = torch.zeros(len(self.own), most, K, width.shape[1], dtype=width.dtype, device=device)
        for row, latents in enumerate(self.own):
            if latents:
                own[row, : len(latents)] = torch.stack(latents)
        everyone = torch.ones(len(self.own), dtype=torch.int64, device=device)
        fed = torch.stack(
            [
                torch.stack([source(own[:, m, k], Place(everyone * m, everyone * k)) for k in range(steps)], dim=1)
                for m in range(most)
            ],
            dim=1,
        )
        return torch.cat([fed[row, : len(latents)].flatten(0, 1) for row, latents in enumerate(self.own)])

    def _score(self, hidden: Tensor, row: int) -> float:
        """hidden [T, D] of a row that ends in its last words."""
        words = self.words[row]
        first = len(hidden) - len(words.tokens)
        at = torch.arange(first + words.scored.start, first + words.scored.stop, device=hidden.device)
        logits = self.reasoner.model.lm_head(hidden[at - 1]).float().log_softmax(-1)
        scored = words.tokens[words.scored.start : words.scored.stop]
        expected = torch.tensor(scored, device=hidden.device, dtype=torch.int64)
        return float(logits.gather(1, expected[:, None]).sum())
