"""One training sample as it travels through packing, shards and the loader.

A sample is a question with 0..n input images and a plan of steps. A text step holds text; a latent
step stands for one *helper image*, the picture that the reasoning would look like at that point.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from PIL import Image, UnidentifiedImageError

from ilvr_ds.errors import OneLineError

IMAGE_MARKER = "<image>"
Region = tuple[float, float, float, float]
"""A box in pixels of an image as it is stored: left, top, right, bottom, from the top left corner."""
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")
DECODE_PIXEL_LIMIT = 64 * 1024 * 1024
"""No stored image may decode to more pixels than this: a 20 KB PNG can otherwise ask for gigabytes."""


class SampleError(OneLineError, ValueError):
    """A record that cannot become a sample; the message says why in one line."""


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
    """Raise SampleError where the parts of `sample` do not fit together.

    No image is decoded; of helper images with a region the header is read.
    """
    if not sample.id:
        raise SampleError("the id is empty")
    helpers = [step.helper for step in sample.steps if isinstance(step, LatentStep)]
    if helpers != list(range(len(sample.helper_images))):
        raise SampleError(f"{len(helpers)} latent steps but {len(sample.helper_images)} helper images, or out of order")
    for number, step in enumerate(sample.steps, start=1):
        if isinstance(step, LatentStep) and step.region is not None:
            try:
                _check_region(step.region, *image_size(sample.helper_images[step.helper]))
            except SampleError as error:
                raise SampleError(f"step {number} of the plan: {error}") from error
    texts = [sample.id, sample.question, sample.answer, sample.group, *sample.meta, *sample.meta.values()]
    try:
        "".join([*texts, *(step.content for step in sample.steps if isinstance(step, TextStep))]).encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON may hold and no tokenizer takes
        raise SampleError(f"the text is not valid Unicode ({error.reason})") from error
    markers = sample.question.count(IMAGE_MARKER)
    if markers and markers != len(sample.input_images):
        found = len(sample.input_images)
        raise SampleError(f"{markers} {IMAGE_MARKER} markers in the question but {found} input images")


def _check_region(region: Region, width: int, height: int) -> None:
    """Raise SampleError where a box is empty or not inside an image of so many pixels."""
    left, top, right, bottom = region
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):  # and NaN
        raise SampleError(
            f"region {list(region)} is no box [left, top, right, bottom] inside its helper image of {width}x{height} "
            "pixels"
        )


def decode_image(data: bytes, pixel_limit: int = DECODE_PIXEL_LIMIT) -> Image.Image:
    """Decode to an RGB image; the size is checked before any pixel is.

    Raises SampleError for other formats, damaged files and images above `pixel_limit` pixels.
    """
    with _errors_in_one_line(pixel_limit):
        return _open_image(data, pixel_limit).convert("RGB")


def image_size(data: bytes, pixel_limit: int = DECODE_PIXEL_LIMIT) -> tuple[int, int]:
    """Width and height of an image by its header, without decoding a pixel; raises SampleError like decode_image."""
    with _errors_in_one_line(pixel_limit):
        return _open_image(data, pixel_limit).size


def _open_image(data: bytes, pixel_limit: int) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
    width, height = image.size
    if width * height > pixel_limit:
        raise SampleError(f"image of {width}x{height} pixels is above the limit of {pixel_limit} pixels")
    return image


@contextmanager
def _errors_in_one_line(pixel_limit: int) -> Iterator[None]:
    """Whatever Pillow raises, as a SampleError."""
    try:
        yield
    except UnidentifiedImageError as error:  # its text holds the address of an object
        raise SampleError(f"not a {', '.join(IMAGE_FORMATS)} image") from error
    except Image.DecompressionBombError as error:
        raise SampleError(f"image above the limit of {pixel_limit} pixels ({error})") from error
    except (OSError, SyntaxError, ValueError) as error:
        if isinstance(error, SampleError):
            raise
        raise SampleError(f"not a readable {', '.join(IMAGE_FORMATS)} image ({error})") from error
