"""The authors' format.

    {"text_input": ..., "image_input": [...],
     "sequence_plan": [{"type": "text", "content": ...},
                       {"type": "latent", "helper_image": ..., "region": [left, top, right, bottom]}, ...],
     "original_final_answer": ...}

`region`, which may be absent, is what the step is about: a box in pixels of the helper image. An empty `sequence_plan`
makes a sample to evaluate on.
"""

from __future__ import annotations

import difflib
import json
import re

from ilvr_ds.data.sample import LatentStep, Region, SampleError, Step, TextStep
from ilvr_ds.errors import nearest
from ilvr_ds.ingest.picture import LEAST_PIXELS, Picture
from ilvr_ds.ingest.record import Draft, Record, RecordFormat, has_keys, kind, picture, pictures, short_text, text
from ilvr_ds.ingest.record_keys import check_keys

_KEYS = {"text": ("content",), "latent": ("helper_image", "region")}
"""Of a step besides `type`, by its type; others are free."""


def _read(record: Record) -> Draft:
    check_keys(record, has_answer=False)
    steps, helpers = _plan(record)
    answer, other = short_text(record, "original_final_answer"), short_text(record, "answer")
    if answer and other not in ("", answer):
        raise SampleError(f"'original_final_answer' is '{answer}' and 'answer' is '{other}'; leave one of them out")
    return Draft(text(record, "text_input"), steps, pictures(record, "image_input"), helpers, answer)


ILVR = RecordFormat(
    "ilvr",
    re.compile("text_input|image_input|sequence_plan|original_final_answer"),
    has_keys("sequence_plan", "original_final_answer"),
    _read,
)


def _plan(record: Record) -> tuple[list[Step], list[Picture]]:
    """Steps and helper images of a `sequence_plan`."""
    if "sequence_plan" not in record:
        raise SampleError("missing key 'sequence_plan' (an empty list stands for a sample to evaluate on)")
    plan = record["sequence_plan"]
    if not isinstance(plan, list):
        raise SampleError(f"'sequence_plan' is {kind(plan)}, expected a list")
    steps: list[Step] = []
    helpers: list[Picture] = []
    for number, step in enumerate(plan, start=1):
        try:
            if not isinstance(step, dict):
                raise SampleError(f"it is {kind(step)}, expected an object")
            if (type_of_step := text(step, "type")) not in _KEYS:
                raise SampleError(f"unknown type '{type_of_step}'{nearest(type_of_step, _KEYS)}")
            if type_of_step == "text":
                steps.append(TextStep(text(step, "content")))
            else:
                steps.append(LatentStep(len(helpers), _region(step)))
                helpers.append(picture(step, "helper_image"))
            _check_keys(step, type_of_step)
        except SampleError as error:
            raise SampleError(f"step {number} of the plan: {error}") from error
    return steps, helpers


def _check_keys(step: Record, type_of_step: str) -> None:
    """Raise SampleError where a step holds what its type has no place for, or a misspelt key."""
    for key, value in step.items():
        if key in ("type", *_KEYS[type_of_step]) or value in (None, "", []):
            continue
        if other := next((other for other in _KEYS if key in _KEYS[other]), ""):
            raise SampleError(f"it has '{key}', which is for steps of type {other}, but is of type {type_of_step}")
        if close := difflib.get_close_matches(key, _KEYS[type_of_step], n=1, cutoff=0.8):
            raise SampleError(f"unknown key '{key}'; did you mean '{close[0]}'?")


def _region(step: Record) -> Region | None:
    """The box of a latent step; whether it lies inside the image is checked with the sample."""
    value = step.get("region")
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 4 or not all(type(x) in (int, float) for x in value):
        raise SampleError(f"'region' is {json.dumps(value)}, expected [left, top, right, bottom] in pixels")
    if max(value) < LEAST_PIXELS:
        raise SampleError(f"'region' is {json.dumps(value)}, which looks like fractions; expected pixels")
    left, top, right, bottom = value
    return left, top, right, bottom
