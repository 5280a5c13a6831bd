"""One training sample as it travels through packing, shards and the loader.

A sample is a question with 0..n input images and a plan of steps. A text step holds text; a latent
step stands for one *helper image*, the picture that the reasoning would look like at that point.
"""

from __future__ import annotations

from dataclasses import dataclass, field

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


@dataclass(frozen=True)
class Sample:
    """One sample; images are the encoded bytes of JPEG, PNG or WebP files.

    `question` may hold `<image>` markers: the input images then stand at the markers, else before
    the text. The helper images are in the order of the latent steps. A sample without steps can only be
    evaluated on. `group` names the kind of task (an operation, a level) by which metrics are split; "" where
    the source has none. `meta` holds what else scoring may need.
    """

    id: str
    question: str
    steps: tuple[Step, ...]
    input_images: tuple[bytes, ...] = ()
    helper_images: tuple[bytes, ...] = ()
    answer: str = ""
    group: str = ""
    meta: dict[str, str] = field(default_factory=dict)


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
