"""One training sample as it travels through packing, shards and the loader.

A sample is a question with 0..n input images and a plan of steps. A text step holds text; a latent
step stands for one *helper image*, the picture that the reasoning would look like at that point.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ilvr_ds.errors import OneLineError

IMAGE_MARKER = "<image>"
Region = tuple[float, float, float, float]
"""A box in pixels of an upright image: left, top, right, bottom, from its top left corner."""


class SampleError(OneLineError, ValueError):
    """A record cannot become a sample; the message says why in one line."""


@dataclass(frozen=True)
class TextStep:
    """A piece of the rationale in words."""

    content: str


@dataclass(frozen=True)
class LatentStep:
    """A latent segment; `helper` is the index of its helper image in `Sample.helper_images`.

    `region` is the part of the helper image that the step is about, where the source says it.
    """

    helper: int
    region: Region | None = None


Step = TextStep | LatentStep

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Turn:
    """A turn of a conversation before the question; only a user's holds `<image>` markers."""

    role: Role
    text: str


@dataclass(frozen=True)
class Sample:
    """One sample; images are the encoded bytes of JPEG, PNG or WebP files.

    `question` may hold `<image>` markers: the input images then stand at the markers, else before the text. `history`
    is the conversation before the question: perhaps a system turn, then user and assistant in turn. Images are then
    counted through all of the user's texts, and stand before the first where none has a marker. The assistant's turns
    there are learned from like the plan, but hold text alone. The helper images are in the order of the latent steps. A
    sample without steps can only be evaluated on. `group` names the kind of task (an operation, a level) by which
    metrics are split; "" where the source has none. `meta` holds what else scoring may need.
    """

    id: str
    question: str
    steps: tuple[Step, ...]
    input_images: tuple[bytes, ...] = ()
    helper_images: tuple[bytes, ...] = ()
    answer: str = ""
    group: str = ""
    meta: dict[str, str] = field(default_factory=dict)
    history: tuple[Turn, ...] = ()

    @property
    def user_texts(self) -> tuple[str, ...]:
        """What the user says, turn by turn; the question is the last."""
        return (*(turn.text for turn in self.history if turn.role == "user"), self.question)

    @property
    def texts(self) -> list[str]:
        """All that it says, with names and keys."""
        plan = [step.content for step in self.steps if isinstance(step, TextStep)]
        said = [turn.text for turn in self.history]
        return [self.id, self.question, self.answer, self.group, *self.meta, *self.meta.values(), *plan, *said]


def history_fault(history: tuple[Turn, ...]) -> str:
    """What is wrong with the order of the turns before a question; "" if nothing."""
    turns = [turn.role for turn in history if turn.role != "system"]
    if any(turn.role == "system" for turn in history[1:]):
        return "a system turn that is not the first"
    if len(turns) % 2 or any(role != ("user", "assistant")[n % 2] for n, role in enumerate(turns)):
        return "the user's and the assistant's turns do not alternate"
    return "a turn is empty" if any(not turn.text.strip() for turn in history) else ""


def texts_before_latents(sample: Sample) -> list[str]:
    """The text between each latent step and the one before it."""
    texts, pending = [], ""
    for step in sample.steps:
        if isinstance(step, TextStep):
            pending += step.content
        elif isinstance(step, LatentStep):
            texts.append(pending)
            pending = ""
    return texts
