"""Whether the parts of a sample fit together, before it is packed and after it is read."""

from __future__ import annotations

from ilvr_ds.data.decode import image_size
from ilvr_ds.data.sample import IMAGE_MARKER, LatentStep, Region, Sample, SampleError, history_fault


def check_sample(sample: Sample) -> None:
    """Raise SampleError where they do not.

    No image is decoded; helper images with a region have their headers read.
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
    if fault := history_fault(sample.history):
        raise SampleError(f"the conversation before the question: {fault}")
    try:
        "".join(sample.texts).encode()
    except UnicodeEncodeError as error:  # half a surrogate pair: JSON allows it, no tokenizer takes it
        raise SampleError(f"the text is not valid Unicode ({error.reason})") from error
    markers = sum(text.count(IMAGE_MARKER) for text in sample.user_texts)
    if markers and markers != len(sample.input_images):
        found, where = len(sample.input_images), "the user's turns" if sample.history else "the question"
        raise SampleError(f"{markers} {IMAGE_MARKER} markers in {where} but {found} input images")


def _check_region(region: Region, width: int, height: int) -> None:
    """Raise SampleError where a box is empty or not inside an image of this size in pixels."""
    left, top, right, bottom = region
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):  # false for NaN too
        raise SampleError(
            f"region {list(region)} is no box [left, top, right, bottom] inside its helper image of {width}x{height} "
            "pixels"
        )
