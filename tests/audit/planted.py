"""Models whose use of their latents is known, because it is written here instead of learnt.

A picture is of one colour, the answer its letter. Vectors have a place for each token, one for each colour, and some in
which samples differ. The planted model writes a segment and then the answer; what it puts into its latents, and from
what it takes the answer, is what a case is about:

uses          latents hold the colour; the answer is read off the latents
ignores       latents hold the colour; the answer is read off the picture: dummies
placeholder   the same, but without anything in the latents' place the answer is always A
collapsed     latents are the same for all samples; the answer is read off the picture

Where nothing can be seen of the colour the answer is A.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ilvr_ds.data.sample import LatentStep, Sample, TextStep
from ilvr_ds.data.tokens import load_tokenizer
from ilvr_ds.data.window import ImageBatch
from ilvr_ds.demo.tiny import build_tiny_model
from ilvr_ds.generation.loading import Reasoner, load_reasoner

COLOURS = ((220, 20, 20), (20, 180, 20), (20, 20, 220), (230, 220, 30))
LETTERS = "ABCD"
OWN = 16
"""Places in which samples differ."""
QUESTION = "What is the colour? A) red B) green C) blue D) yellow"
LATENTS = 2


def planted_samples(count: int, with_helpers: bool = True) -> Iterator[Sample]:
    """Each colour as often as the others."""
    rng = np.random.default_rng(0)
    for number in range(count):
        colour = number % 4
        picture = _picture(COLOURS[colour], rng)
        steps = (TextStep("Look."), LatentStep(0), TextStep(words(colour)))
        yield Sample(
            id=f"sample-{number}",
            question=QUESTION,
            steps=steps if with_helpers else (TextStep(words(colour)),),
            input_images=(picture,),
            helper_images=(picture,) if with_helpers else (),
            answer=LETTERS[colour],
        )


def words(colour: int) -> str:
    """The answer as it is written."""
    return f"The answer is ({LETTERS[colour]})"


def _picture(colour: tuple[int, int, int], rng: np.random.Generator) -> bytes:
    """Of one colour, nearly: what is left of its exact shade tells samples apart."""
    shade = np.clip(np.array(colour) + rng.integers(-15, 16, 3), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(np.tile(shade, (56, 56, 1))).save(file, "png")
    return file.getvalue()


def write_planted(folder: Path) -> None:
    """A model folder whose tokenizer and image processor the planted models use."""
    build_tiny_model(folder, texts=[QUESTION, *(words(n) for n in range(4)), "Look."] * 50)
    tokenizer, _ = load_tokenizer(str(folder))
    tokenizer.save_pretrained(folder)


def planted_reasoner(folder: Path, case: str) -> Reasoner:
    """A reasoner that answers as the case says."""
    real = load_reasoner(str(folder), torch.device("cpu"), latent_size=LATENTS)
    model = PlantedModel(real, case)
    return replace(real, model=model, tower=PlantedTower(len(real.encoder.tokenizer)))


@dataclass(frozen=True)
class Places:
    """Of a vector."""

    tokens: int

    @property
    def width(self) -> int:
        return self.tokens + 4 + OWN

    @property
    def colours(self) -> slice:
        return slice(self.tokens, self.tokens + 4)

    @property
    def own(self) -> slice:
        return slice(self.tokens + 4, self.width)


class PlantedTower:
    """Every merged patch of a picture is its colour, and a little of what is its own."""

    def __init__(self, tokens: int) -> None:
        self.places = Places(tokens)

    def __call__(self, images: ImageBatch) -> Tensor:
        rows = []
        bounds = images.cu_seqlens.tolist()
        for first, last in pairwise(bounds):
            patches = images.patches[first:last].float()
            mean = patches.view(len(patches), 3, -1).mean((0, 2))
            colour = int((mean - torch.tensor(COLOURS).float()).norm(dim=1).argmin())
            row = torch.zeros((last - first) // 4, self.places.width)
            row[:, self.places.colours][:, colour] = 1
            generator = torch.Generator().manual_seed(int(mean.sum() * 1000))
            row[:, self.places.own] = 0.5 * torch.randn(OWN, generator=generator) / OWN**0.5
            rows.append(row)
        return torch.cat(rows)


class PlantedModel:
    """What the generator and the teacher's context call of a stock model."""

    dtype = torch.float32

    def __init__(self, real: Reasoner, case: str) -> None:
        self.config = real.model.config
        self.places = Places(len(real.encoder.tokenizer))
        self.embedding = nn.Embedding.from_pretrained(torch.eye(self.places.tokens, self.places.width))
        self.model = SimpleNamespace(language_model=PlantedLanguageModel(real, case, self.places, self.embedding))

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def lm_head(self, hidden: Tensor) -> Tensor:
        return 10 * hidden[..., : self.places.tokens]


class PlantedLanguageModel(nn.Module):
    """Reads vectors, with a cache or without, and says what comes next."""

    def __init__(self, real: Reasoner, case: str, places: Places, embedding: nn.Embedding) -> None:
        super().__init__()
        self.case, self.places, self.special = case, places, real.special
        self.config = real.model.model.language_model.config
        self.embed_tokens = embedding
        tokenizer = real.encoder.tokenizer
        self.scripts = [tokenizer(words(n), add_special_tokens=False)["input_ids"] for n in range(4)]
        self.opening = len(tokenizer("assistant\n", add_special_tokens=False)["input_ids"])
        identity = nn.Identity()
        attention = SimpleNamespace(q_proj=identity, k_proj=identity, head_dim=places.width)
        self.layers = [SimpleNamespace(self_attn=attention)]

    def forward(
        self, inputs_embeds: Tensor, attention_mask: dict[str, Any], past_key_values: Any = None, **_: Any
    ) -> Any:
        before = getattr(past_key_values, "planted", inputs_embeds[:, :0])
        everything = torch.cat([before, inputs_embeds], dim=1)
        if past_key_values is not None:
            past_key_values.planted = everything
        B, t, T = *inputs_embeds.shape[:2], everything.shape[1]
        mask = attention_mask["full_attention"]
        if mask is None:
            mask = torch.ones(t, T, dtype=torch.bool).tril(T - t)
        seen = mask.view(-1, *mask.shape[-2:]).expand(B, t, T)
        hidden = torch.zeros(B, t, self.places.width)
        for row in range(B):
            tokens = self._tokens(everything[row])
            turn = int((tokens == self.special.im_start).nonzero()[-1])
            for place in range(t):
                now = T - t + place
                if now >= turn + self.opening:
                    hidden[row, place] = self._next(everything[row], tokens, seen[row, place], now, turn)
        return SimpleNamespace(last_hidden_state=hidden)

    def _tokens(self, vectors: Tensor) -> Tensor:
        """[T]: the token that a vector is, -1 for features of pictures and for latents."""
        best, token = vectors[:, : self.places.tokens].max(1)
        return torch.where(best > 0.99, token, -1)

    def _next(self, vectors: Tensor, tokens: Tensor, seen: Tensor, now: int, turn: int) -> Tensor:
        """The hidden state at place `now` of a sequence, of which it sees `seen`."""
        special, hidden = self.special, torch.zeros(self.places.width)
        written = tokens[turn + self.opening + 1 : now + 1]
        opens = (written == special.latent_start).nonzero()
        ends = (written == special.latent_end).nonzero()
        if len(opens) > len(ends):
            return self._latent(vectors, tokens, seen, now, turn)
        script = self.scripts[self._colour(vectors, tokens, seen, now, turn)]
        done = len(written) - (int(ends[-1]) + 1 if len(ends) else 0)
        following = script[done] if done < len(script) else special.im_end
        if not len(written):
            hidden[special.latent_start] = 1.0
            hidden[following] = 0.5
        else:
            hidden[following] = 1.0
        return hidden

    def _picture(self, vectors: Tensor, tokens: Tensor, seen: Tensor, turn: int) -> Tensor:
        """Mean of what is seen of the picture, 0 where nothing is."""
        mine = seen.clone()
        mine[turn:] = False
        mine &= tokens == -1
        return vectors[mine].mean(0) if mine.any() else torch.zeros(self.places.width)

    def _latent(self, vectors: Tensor, tokens: Tensor, seen: Tensor, now: int, turn: int) -> Tensor:
        if self.case == "collapsed":
            same = torch.zeros(self.places.width)
            same[self.places.own] = 1.0
            return same
        return self._picture(vectors, tokens, seen, turn)

    def _colour(self, vectors: Tensor, tokens: Tensor, seen: Tensor, now: int, turn: int) -> int:
        """Which answer is given."""
        inside = torch.arange(len(tokens)) > turn
        opened = ((tokens == self.special.latent_start) & inside).cumsum(0)
        closed = ((tokens == self.special.latent_end) & inside).cumsum(0)
        slots = (opened > closed) & (tokens != self.special.latent_start) & (torch.arange(len(tokens)) <= now) & seen
        latents = vectors[slots]
        if self.case == "uses":
            found = latents.mean(0) if len(latents) else torch.zeros(self.places.width)
        elif self.case == "placeholder" and not latents.abs().sum():
            found = torch.zeros(self.places.width)
        else:
            found = self._picture(vectors, tokens, seen, turn)
        return int(found[self.places.colours].argmax())
