"""Visual-CoT's data (github.com/deepcs233/Visual-CoT, README; tools/convert_data_to_llava_format.py writes the first
form from the second).

    {"dataset": ..., "image": ["a.jpg", "a.jpg###[141, 87, 397, 298]"],
     "conversations": [{"from": "human", "value": "<image>\\n... Please provide the bounding box coordinate ..."},
                       {"from": "gpt", "value": "[0.282, 0.316, 0.794, 0.738]"},
                       {"from": "human", "value": "<image>"}, {"from": "gpt", "value": "No"}]}
    {"dataset": ..., "image": "a.jpg", "question": ..., "answer": ..., "bboxs": [[139.0, 30.0, 292.0, 294.0]]}

Both become a question, one latent step about the box in pixels, and the answer. The request for a box and the box in
words, which counts in fractions of the image padded to a square, are left out. Several boxes become the one around all,
as in the published converter.
"""

from __future__ import annotations

import json
import re

from ilvr_ds.data.sample import IMAGE_MARKER, LatentStep, SampleError, TextStep
from ilvr_ds.ingest.formats.conversations import FAMILY, OWN_KEYS
from ilvr_ds.ingest.formats.turns import last_question, read_turns
from ilvr_ds.ingest.picture import Box, Picture, read_box, read_picture
from ilvr_ds.ingest.record import Draft, Record, RecordFormat, items, pictures, short_text, text

_SEPARATOR = "###"
_REQUEST = re.compile(
    r"Please (?:think step by step and )?provide the bounding box coordinate of the region[^.\n]*\.?[ \t]*"
)
_BOX_IN_WORDS = re.compile(r"[\s\d.,;()\[\]-]*")
_EXCHANGES = 2


def _recognise(record: Record) -> str:
    if record.get("bboxs") is not None:
        return "it has the key 'bboxs'"
    images = record.get("image")
    has_box = isinstance(images, list) and any(isinstance(name, str) and _SEPARATOR in name for name in images)
    return f"its 'image' names a box behind {_SEPARATOR}" if has_box and "conversations" in record else ""


def _read(record: Record) -> Draft:
    question, answer, image, box = _conversation(record) if "conversations" in record else _metadata(record)
    return Draft(
        question=question,
        steps=[LatentStep(0), TextStep(answer)],
        input_images=[image],
        helper_images=[Picture(image.paths, image.data, box)],
        answer=answer.strip(),
        group=short_text(record, "dataset"),
    )


VISUAL_COT = RecordFormat("visual-cot", re.compile(f"{OWN_KEYS}|question|answer|bboxs"), _recognise, _read, FAMILY)


def _conversation(record: Record) -> tuple[str, str, Picture, Box]:
    turns, _ = read_turns(record)
    history, part, answer = last_question(turns)
    if len(turns) != 2 * _EXCHANGES or not answer:
        raise SampleError(f"{len(turns)} turns, expected question, box, the part of the image, answer")
    if not _BOX_IN_WORDS.fullmatch(history[1].text):
        raise SampleError(f"turn 2 holds more than a box, which would be lost: {history[1].text!r}")
    if part.replace(IMAGE_MARKER, "").strip():
        raise SampleError(f"turn 3 holds more than {IMAGE_MARKER}, which would be lost: {part!r}")
    names = items(record, "image")
    if len(names) != 2 or not all(isinstance(name, str) for name in names):
        raise SampleError("'image' is not the image and the image with its box")
    name, _, corners = names[1].partition(_SEPARATOR)
    try:
        values = json.loads(corners)
    except ValueError as error:
        raise SampleError(f"'{names[1]}' names no box [left, top, right, bottom] behind {_SEPARATOR}") from error
    box = read_box(values)
    if name != names[0]:
        raise SampleError(f"the box lies in '{name}', the question's image is '{names[0]}'")
    image = read_picture(name)
    if image is None:
        raise SampleError("'image' holds an empty path, expected a path")
    return _REQUEST.sub("", history[0].text).rstrip(), answer, image, box


def _metadata(record: Record) -> tuple[str, str, Picture, Box]:
    images = pictures(record, "image")
    if len(images) != 1:
        raise SampleError(f"'image' holds {len(images)} images, expected one")
    boxes = [read_box(box).corners for box in items(record, "bboxs")]
    lefts, tops, rights, bottoms = zip(*boxes, strict=True)
    around = Box((min(lefts), min(tops), max(rights), max(bottoms)))
    answer = short_text(record, "answer")
    if not answer.strip():
        raise SampleError("missing key 'answer'")
    return text(record, "question"), answer, images[0], around
