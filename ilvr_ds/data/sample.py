"""One training sample as it travels through packing, shards and the loader.

A sample is a question with 0..n input images and a plan of steps. A text step holds text; a latent
step stands for one *helper image*, the picture that the reasoning would look like at that point.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ilvr_ds.errors import OneLineError

IMAGE_MARKER = "<image>"


class SampleError(OneLineError, ValueError):
    """A record that cannot become a sample; the message says why in one line."""


@dataclass(frozen=True)
class TextStep:
    """A piece of the rationale in words."""

    content: str


@dataclass(frozen=True)
class LatentStep:
    """A latent segment; `helper` is the index of its helper image in `Sample.helper_images`."""

    helper: int


Step = TextStep | LatentStep


@dataclass(frozen=True)
class Sample:
    """One sample; images are the encoded bytes of JPEG, PNG or WebP files.

    `question` may hold `<image>` markers: the input images then stand at the markers, else before
    the text. The helper images are in the order of the latent steps. No steps at all: a sample to
    evaluate on, without supervision. `group` names the kind of task (an operation, a level) by which
    metrics are split; "" where the source has none. `meta` is what scoring may need besides.
    """

    id: str
    question: str
    steps: tuple[Step, ...]
    input_images: tuple[bytes, ...] = ()
    helper_images: tuple[bytes, ...] = ()
    answer: str = ""
    group: str = ""
    meta: dict[str, str] = field(default_factory=dict)


def check_sample(sample: Sample) -> None:
    """Raise SampleError where the parts of `sample` do not fit together (images are not decoded here)."""
    if not sample.id:
        raise SampleError("the id is empty")
    helpers = [step.helper for step in sample.steps if isinstance(step, LatentStep)]
    if helpers != list(range(len(sample.helper_images))):
        raise SampleError(f"{len(helpers)} latent steps but {len(sample.helper_images)} helper images, or out of order")
    texts = [sample.id, sample.question, sample.answer, sample.group, *sample.meta, *sample.meta.values()]
    try:
        "".join([*texts, *(step.content for step in sample.steps if isinstance(step, TextStep))]).encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON may hold and no tokenizer takes
        raise SampleError(f"the text is not valid Unicode ({error.reason})") from error
    markers = sample.question.count(IMAGE_MARKER)
    if markers and markers != len(sample.input_images):
        found = len(sample.input_images)
        raise SampleError(f"{markers} {IMAGE_MARKER} markers in the question but {found} input images")
