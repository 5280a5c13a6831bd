r"""Mirage's format.

    {"text_input": ..., "image_input": [...],
     "text_output": "<think> ... </think><output_image> ... \\boxed{A}.", "image_output": ...}

The helper image stands where `<output_image>` (or `<image>`) stands in the text, before the text where there is no
marker. `<think>` is text like any other. The answer is what the last `\boxed{...}` holds. A record without both outputs
is a sample to evaluate on.
"""

from __future__ import annotations

import re

from ilvr_ds.data.sample import SampleError, Step
from ilvr_ds.ingest.formats.pieces import boxed, plan_of
from ilvr_ds.ingest.picture import Picture
from ilvr_ds.ingest.record import Draft, Record, RecordFormat, has_keys, pictures, text
from ilvr_ds.ingest.record_keys import check_keys

_OUTPUT_MARKERS = re.compile(r"<output_image>|<image>")


def _read(record: Record) -> Draft:
    answer = boxed(str(record.get("text_output")))
    check_keys(record, has_answer=bool(answer))
    steps, helpers = _plan(record)
    return Draft(text(record, "text_input"), steps, pictures(record, "image_input"), helpers, answer)


MIRAGE = RecordFormat(
    "mirage",
    re.compile("text_input|image_input|text_output|image_output"),
    has_keys("text_output", "image_output"),
    _read,
)


def _plan(record: Record) -> tuple[list[Step], list[Picture]]:
    """Steps and helper images of `text_output` and `image_output`."""
    helpers = pictures(record, "image_output")
    if not helpers and record.get("text_output") is None:
        return [], []
    pieces = _OUTPUT_MARKERS.split(text(record, "text_output"))
    if len(pieces) == 1:
        pieces = [""] * len(helpers) + pieces
    if len(pieces) - 1 != len(helpers):
        raise SampleError(f"{len(pieces) - 1} image markers in 'text_output' but {len(helpers)} in 'image_output'")
    return plan_of(pieces), helpers
