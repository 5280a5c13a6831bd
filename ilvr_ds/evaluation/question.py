"""A question from the command line as a sample."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ilvr_ds.data.check import check_sample
from ilvr_ds.data.decode import decode_image
from ilvr_ds.data.sample import Sample, SampleError
from ilvr_ds.errors import UserError


def ask(question: str, images: Sequence[Path]) -> Sample:
    """A sample without steps; raises UserError where an image is missing or does not decode, or markers do not fit."""
    if not question.strip():
        raise UserError("--question: is empty")
    sample = Sample(id="question", question=question, steps=(), input_images=read_images(images))
    try:
        check_sample(sample)
    except SampleError as error:
        raise UserError(f"--question: {error}") from error
    return sample


def read_images(paths: Sequence[Path]) -> tuple[bytes, ...]:
    """The files; raises UserError where one is missing or does not decode."""
    data = []
    for path in paths:
        try:
            data.append(path.read_bytes())
            decode_image(data[-1])
        except OSError as error:
            raise UserError(f"--image {path}: cannot read it ({error.strerror})") from error
        except SampleError as error:
            raise UserError(f"--image {path}: {error}; give a JPEG, PNG or WebP file") from error
    return tuple(data)
