"""What a harness asks, answered with latents: words and pictures in the order of a chat turn become a prompt."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace

from PIL import Image

from ilvr_ds import dist
from ilvr_ds.base_model import model_on_host
from ilvr_ds.data.check import check_sample
from ilvr_ds.data.sample import IMAGE_MARKER, Sample
from ilvr_ds.evaluation.scoring import extract_answer
from ilvr_ds.generation.generate import Generator
from ilvr_ds.generation.loading import Reasoner, load_reasoner
from ilvr_ds.generation.settings import GenerationSettings

Part = str | bytes | Image.Image
"""Of a chat turn: words, or a picture, encoded or not."""


@dataclass(frozen=True)
class HarnessSettings:
    """A model, and how it answers; harnesses hand these over by name."""

    model: str
    """Folder that `ilvr-ds export` wrote, or a name on the hub."""
    max_new_tokens: int = 1024
    """At least so many, latent steps included, whatever a task allows: tasks count the tokens of a bare letter."""
    answer_only: bool = False
    """Hand over what the answer concludes (`extract_answer`), not all of it."""
    latent_size: int | None = None
    precision: str = "auto"
    max_image_pixels: int | None = None


@dataclass(frozen=True)
class Reply:
    """What the harness gets, and what it took."""

    text: str
    prompt_tokens: int
    new_tokens: int
    """Latent steps included."""
    latent_steps: int


class Answerer:
    """Answers chat turns; loads the model at once. Raises UserError where it cannot."""

    def __init__(self, settings: HarnessSettings) -> None:
        self.settings = settings
        self.reasoner: Reasoner = load_reasoner(
            model_on_host(settings.model),
            dist.device(),
            settings.precision,
            settings.latent_size,
            settings.max_image_pixels,
        )
        self._asked = 0

    def __call__(self, turns: Sequence[Sequence[Part]], generation: GenerationSettings) -> list[Reply]:
        """A reply to each turn, all answered as one batch. What is drawn at a temperature depends on the settings' seed
        and on how many turns came before, whatever the batches.

        Raises SampleError where a picture does not decode or words hold a reserved token.
        """
        named = enumerate(turns, start=self._asked)
        prompts = [self.reasoner.encoder.prompt(question(turn, f"{number}")) for number, turn in named]
        self._asked += len(turns)
        limit = max(generation.max_new_tokens, self.settings.max_new_tokens)
        answers = Generator(self.reasoner, replace(generation, max_new_tokens=limit))(prompts).answers
        return [
            Reply(
                text=extract_answer(answer.text) if self.settings.answer_only else answer.text,
                prompt_tokens=len(prompt.input_ids),
                new_tokens=len(answer.tokens),
                latent_steps=sum(answer.steps),
            )
            for prompt, answer in zip(prompts, answers, strict=True)
        ]


def question(turn: Sequence[Part], name: str) -> Sample:
    """A chat turn as a sample.

    Pictures stand where the turn has them. Markers `<image>` in its words count if they are as many as the pictures;
    else they are left out, as tasks write them for other models.
    """
    pictures = [part for part in turn if not isinstance(part, str)]
    written = "".join(part for part in turn if isinstance(part, str))
    if written.count(IMAGE_MARKER) != len(pictures):
        parts = [part.replace(IMAGE_MARKER, "") if isinstance(part, str) else IMAGE_MARKER for part in turn]
        written = "".join(parts)
    sample = Sample(id=name, question=written, steps=(), input_images=tuple(map(_encoded, pictures)))
    check_sample(sample)
    return sample


def _encoded(picture: bytes | Image.Image) -> bytes:
    if isinstance(picture, bytes):
        return picture
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
