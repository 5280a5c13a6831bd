"""Zebra-CoT (huggingface.co/datasets/multimodal-reasoning-lab/Zebra-CoT, the data set's card; placeholders and what
training does with them: github.com/multimodal-reasoning-lab/Bagel-Zebra-CoT).

    {"Question": "... <image_start>[problem_image_1]<image_end>", "problem_image_1": IMAGE,
     "Text Reasoning Trace": "THOUGHT 0: ... <image_start>[reasoning_image_1]<image_end> THOUGHT 1: ...",
     "reasoning_image_1": IMAGE, ..., "Final Answer": ...}

An image that the trace names becomes a helper image there; the labels `THOUGHT n:` are left out, as in the published
training. Problem images stand where the question names them, before it where it names none.
"""

from __future__ import annotations

import re

from ilvr_ds.data.sample import IMAGE_MARKER, SampleError, Step, TextStep
from ilvr_ds.ingest.formats.pieces import announced, plan_of
from ilvr_ds.ingest.picture import Picture
from ilvr_ds.ingest.record import Draft, Record, RecordFormat, has_keys, picture, short_text, text

_NAMED = re.compile(r"(?:<image_start>\s*)?\[((?:problem|reasoning)_image_\d+)\](?:\s*<image_end>)?")
_LEFT_OVER = re.compile(r"<image_start>|<image_end>|\[[^\[\]]*(?:problem|reasoning)_image_\d+")
"""What is left of a name in another form: it would be words to learn."""
_THOUGHT = re.compile(r"THOUGHT[ _]*\d+\s*:[ \t]*")
_IMAGE_KEY = re.compile(r"(problem|reasoning)_image_(\d+)")


def _read(record: Record) -> Draft:
    question, answer = text(record, "Question"), short_text(record, "Final Answer").strip()
    if not answer:
        raise SampleError("missing key 'Final Answer'")
    trace = text(record, "Text Reasoning Trace")
    asked, told = _NAMED.findall(question), _NAMED.findall(trace)
    if left_over := _LEFT_OVER.search(_NAMED.sub("", f"{question}\n{trace}")):
        raise SampleError(f"'{left_over[0]}' names no image in the form <image_start>[reasoning_image_1]<image_end>")
    if _NAMED.search(answer):
        raise SampleError("'Final Answer' names an image, expected text")
    images = _images(record)
    for name in (*asked, *told):
        if name not in images:
            raise SampleError(f"'{name}' is named in the text but holds no image")
    shown = asked or [name for name in images if name.startswith("problem") and name not in told]
    if unnamed := [name for name in images if name not in {*shown, *told}]:
        raise SampleError(f"'{unnamed[0]}' is named neither in the question nor in the trace")
    return Draft(
        question=_NAMED.sub(IMAGE_MARKER, question),
        steps=_steps(trace, answer),
        input_images=[images[name] for name in shown],
        helper_images=[images[name] for name in told],
        answer=answer,
    )


ZEBRA_COT = RecordFormat(
    "zebra-cot",
    re.compile(rf"Question|Text Reasoning Trace|Final Answer|{_IMAGE_KEY.pattern}"),
    has_keys("Text Reasoning Trace"),
    _read,
)


def _images(record: Record) -> dict[str, Picture]:
    """The images that are there, problem images first, by their numbers."""
    keys = [found for key, value in record.items() if value is not None and (found := _IMAGE_KEY.fullmatch(key))]
    return {key[0]: picture(record, key[0]) for key in sorted(keys, key=lambda key: (key[1], int(key[2])))}


def _steps(trace: str, answer: str) -> list[Step]:
    pieces = [piece for position, piece in enumerate(_NAMED.split(trace)) if position % 2 == 0]
    pieces = [_THOUGHT.sub("", piece) for piece in pieces]
    return [*plan_of([piece if piece.strip() else "" for piece in pieces]), TextStep(f"\n{announced(answer)}")]
