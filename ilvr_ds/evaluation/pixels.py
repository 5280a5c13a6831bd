"""What an answer costs with latents, with its helper images read as pixels, and with helper images that are drawn.

Each way is measured alone, where only the time of an answer counts, and at a batch that fills the device, where the
time of each of many counts. Prompts are not counted: they are the same in all ways.

- latents: the answer's tokens and latent steps, decoded.
- pixels: its words, decoded, and in the place of each segment a helper image that is *given*: through the vision tower,
  and all its tokens through the language model in one call. A model must make the image first, so this is a lower bound
  for interleaved models.
- drawn: its words and the tokens of these images, decoded one by one, as by models that draw with discrete tokens, one
  for DRAWN_SIDE x DRAWN_SIDE pixels. Not run, but computed from the time of a step: a lower bound too, for contexts
  grow, and these tokens are then often read again by a vision tower.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch

from ilvr_ds.data.sample import Sample
from ilvr_ds.data.template import EncodedSample
from ilvr_ds.generation.answers import Answer
from ilvr_ds.generation.context import Context
from ilvr_ds.generation.generate import Generator
from ilvr_ds.generation.loading import Reasoner
from ilvr_ds.generation.prefill import TOKENS_AT_ONCE
from ilvr_ds.generation.settings import GenerationSettings

DRAWN_SIDE = 16
"""Pixels: what one discrete token stands for in Chameleon and Janus; Emu3 has one for 8 x 8"""

Cost = dict[str, Any]


@torch.inference_mode()
def replay_cost(reasoner: Reasoner, sample: Sample, answer: Answer, rows: int) -> Cost:
    """Of each way its tokens, the `seconds` of one answer alone, and `seconds_in_batch` of each of `rows` answers.

    Helper images are taken in order, and from the first again where the answer has more segments.
    """
    prompt = reasoner.encoder.prompt(sample)
    pictures = reasoner.encoder.images(sample.helper_images)
    shown = [pictures[number % len(pictures)] for number in range(answer.segments)]
    replay = _Replay(reasoner, prompt, answer, shown)
    alone, many = replay.seconds(1), replay.seconds(rows)
    tokens = {
        "latents": len(answer.tokens),
        "pixels": replay.words + sum(map(replay.picture_tokens, shown)),
        "drawn": replay.words + replay.drawn,
    }
    ways = {
        way: {"tokens": tokens[way], "seconds": alone[way], "seconds_in_batch": many[way]} for way in tokens
    }  # fmt: skip
    return {**ways, "rows": rows}


class _Replay:
    def __init__(self, reasoner: Reasoner, prompt: EncodedSample, answer: Answer, pictures: list[Any]) -> None:
        self.reasoner, self.prompt, self.pictures = reasoner, prompt, pictures
        special = reasoner.special
        self.tokens = len(answer.tokens)
        self.openings = [n for n, token in enumerate(answer.tokens) if token == special.latent_start]
        latent = (special.latent_start, special.latent_pad, special.latent_end)
        self.words = sum(token not in latent for token in answer.tokens)
        patch = reasoner.encoder.images.cell // reasoner.encoder.merge_size
        self.drawn = sum(-(-h * w * patch**2 // DRAWN_SIDE**2) for _, (h, w) in pictures)

    def seconds(self, rows: int) -> dict[str, float]:
        """Of each way and of one of so many answers."""
        words = self._decoded(rows, self.words, [])
        return {
            "latents": self._decoded(rows, self.tokens, self.openings),
            "pixels": words + self._read(rows),
            "drawn": words * (1 + self.drawn / max(1, self.words)),
        }

    def picture_tokens(self, picture: Any) -> int:
        """In the context, with those around it."""
        _, (h, w) = picture
        return int(h * w // self.reasoner.encoder.merge_size**2) + 2

    def _decoded(self, rows: int, tokens: int, openings: list[int]) -> float:
        """What is said does not matter, so all rows say something, and open segments where the answer did."""
        if tokens == 0:
            return 0.0
        special = self.reasoner.special
        settings = GenerationSettings(
            max_new_tokens=tokens,
            forced=dict.fromkeys(openings, special.latent_start),
            forbidden=(special.latent_start, *self.reasoner.stop_ids),
        )
        generator = Generator(self.reasoner, settings)
        prompts = [self.prompt] * rows
        if self.reasoner.decoder is not None:
            generator(prompts)  # records the steps
        return generator(prompts).speed.decode_s / rows

    def _read(self, rows: int) -> float:
        """The pictures behind the prompt, one after the other, of as many rows as a pass may have."""
        rows = max(1, min(rows, TOKENS_AT_ONCE // len(self.prompt.input_ids)))
        windows = [self.reasoner.collate([self._picture(picture)] * rows) for picture in self.pictures]
        for _ in range(2):  # the first takes workspaces
            context = Context(self.reasoner, [self.prompt] * rows, 0)
            context.prefill()
            started = self.reasoner.now()
            for window in windows:
                self.reasoner.model.lm_head(context.read(window))
            seconds = self.reasoner.now() - started
        return seconds / rows

    def _picture(self, picture: Any) -> EncodedSample:
        special, encoder = self.reasoner.special, self.reasoner.encoder
        patches, grid = picture
        pads = [special.image_pad] * (self.picture_tokens(picture) - 2)
        ids = np.array([special.vision_start, *pads, special.vision_end])
        return dataclasses.replace(
            self.prompt, patches=(patches,), grids=(grid,), num_input_images=1,
            input_ids=ids, labels=ids, position_ids=encoder.positions(ids, [grid]),
        )  # fmt: skip
