r"""Mirage's format.

    {"text_input": ..., "image_input": [...],
     "text_output": "<think> ... </think><output_image> ... \\boxed{A}.", "image_output": ...}

The helper image stands where `<output_image>` (or `<image>`) stands in the text, before the text where there is no
marker. `<think>` is text like any other. The answer is what the last `\boxed{...}` holds. A record without both outputs
is a sample to evaluate on.
"""

from __future__ import annotations

import re

from ilvr_ds.data.sample import LatentStep, SampleError, Step, TextStep
from ilvr_ds.ingest.record import Draft, Record, RecordFormat, paths, text
from ilvr_ds.ingest.record_keys import check_keys

_OUTPUT_MARKERS = re.compile(r"<output_image>|<image>")


def _read(record: Record) -> Draft:
    answer = _boxed(str(record.get("text_output")))
    check_keys(record, has_answer=bool(answer))
    steps, helpers = _plan(record)
    return Draft(text(record, "text_input"), steps, paths(record, "image_input"), helpers, answer)


MIRAGE = RecordFormat("mirage", frozenset({"text_output", "image_output"}), _read)


def _plan(record: Record) -> tuple[list[Step], list[str]]:
    """Steps and helper image paths of `text_output` and `image_output`."""
    helpers = paths(record, "image_output")
    if not helpers and record.get("text_output") is None:
        return [], []
    pieces = _OUTPUT_MARKERS.split(text(record, "text_output"))
    if len(pieces) == 1:
        pieces = [""] * len(helpers) + pieces
    if len(pieces) - 1 != len(helpers):
        raise SampleError(f"{len(pieces) - 1} image markers in 'text_output' but {len(helpers)} in 'image_output'")
    steps: list[Step] = [TextStep(pieces[0])] if pieces[0] else []
    for helper, piece in enumerate(pieces[1:]):
        steps += [LatentStep(helper), TextStep(piece)] if piece else [LatentStep(helper)]
    return steps, helpers


def _boxed(output: str) -> str:
    r"""The content of the last `\boxed{...}`, braces inside it balanced; "" without one."""
    _, found, rest = output.rpartition(r"\boxed{")
    depth = 1
    for position, letter in enumerate(rest if found else ""):
        depth += (letter == "{") - (letter == "}")
        if depth == 0:
            return rest[:position].strip()
    return ""
