"""What an answer costs with latents, and what the same answer costs with its helper images as pixels.

The interleaved baseline reads a helper image where the latent model runs a segment: the image goes through the vision
tower and its tokens through the language model, all in one call. That a baseline has to make the image first is not
counted, so its cost is a lower bound. Text is decoded token by token both times; one answer at a time.
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
from ilvr_ds.generation.loading import Reasoner


@torch.inference_mode()
def replay_cost(reasoner: Reasoner, sample: Sample, answer: Answer) -> dict[str, Any]:
    """Seconds and tokens of `answer` decoded with its latents, and with the sample's helper images in their place.

    Helper images are taken in order, and from the first again where the answer has more segments.
    """
    prompt = reasoner.encoder.prompt(sample)
    pictures = reasoner.encoder.images(sample.helper_images)
    replay = _Replay(reasoner, prompt, answer)
    return {"latents": replay.with_latents(), "pixels": replay.with_pixels(pictures)}


class _Replay:
    def __init__(self, reasoner: Reasoner, prompt: EncodedSample, answer: Answer) -> None:
        self.reasoner, self.prompt, self.tokens = reasoner, prompt, answer.tokens

    def with_latents(self) -> dict[str, float]:
        """The answer as it was generated: a forward for each token and each latent step."""
        context = Context(self.reasoner, [self.prompt], len(self.tokens))
        hidden = context.prefill()
        started = self.reasoner.now()
        for token in self.tokens:
            hidden = context.step(self._column(token), hidden)
            self.reasoner.model.lm_head(hidden)
        return {"seconds": self.reasoner.now() - started, "tokens": len(self.tokens)}

    def with_pixels(self, pictures: list[Any]) -> dict[str, float]:
        """Text as it was; each segment is one picture between vision_start and vision_end."""
        special, device = self.reasoner.special, self.reasoner.device
        unit = self.reasoner.encoder.merge_size**2
        longest = max((h * w // unit for _, (h, w) in pictures), default=0) + 2
        context = Context(self.reasoner, [self.prompt], len(self.tokens) * longest)
        hidden = context.prefill()
        count = segment = 0
        started = self.reasoner.now()
        for token in self.tokens:
            if token == special.latent_start:
                patches, grid = pictures[segment % len(pictures)]
                image = dataclasses.replace(
                    self.prompt, patches=(patches,), grids=(grid,), num_input_images=1, **self._picture_tokens(grid)
                )
                window = self.reasoner.collate([image])
                hidden = context.read(window)
                count += len(image.input_ids)
                segment += 1
            elif token in (special.latent_pad, special.latent_end):
                continue
            else:
                hidden = context.step(torch.tensor([token], device=device), hidden)
                count += 1
            self.reasoner.model.lm_head(hidden)
        return {"seconds": self.reasoner.now() - started, "tokens": count}

    def _picture_tokens(self, grid: tuple[int, int]) -> dict[str, Any]:
        special, encoder = self.reasoner.special, self.reasoner.encoder
        count = grid[0] * grid[1] // encoder.merge_size**2
        ids = np.array([special.vision_start, *[special.image_pad] * count, special.vision_end])
        return {"input_ids": ids, "labels": ids, "position_ids": encoder.positions(ids, [grid])}

    def _column(self, token: int) -> torch.Tensor:
        return torch.tensor([token], device=self.reasoner.device)
