"""LVR's data (github.com/VincentLeebang/lvr, README: dataset preparation; boxes: src/dataset/lvr_sft_dataset.py).

    {"dataset": ..., "image": ["a.jpg"], "bboxes": [[0.1, 0.2, 0.5, 0.6]],
     "conversations": [{"from": "human", "value": "<image>\\n..."},
                       {"from": "gpt", "value": "<lvr>\\n<answer> ... </answer>"}]}

Each `<lvr>` of the last reply stands for the next box, which becomes a helper image there (image_files.cut_box). Boxes
are fractions of width and height, or pixels (picture.read_boxes). They lie in the only image, or box by box in one of
as many images.
"""

from __future__ import annotations

import dataclasses
import re

from ilvr_ds.data.sample import SampleError
from ilvr_ds.ingest.formats.conversations import FAMILY, OWN_KEYS
from ilvr_ds.ingest.formats.pieces import plan_of, stated_answer
from ilvr_ds.ingest.formats.turns import last_question, read_turns
from ilvr_ds.ingest.picture import Picture, read_boxes
from ilvr_ds.ingest.record import Draft, Record, RecordFormat, items, short_text

_PLACE = re.compile(r"\n?<lvr>\n?")


def _recognise(record: Record) -> str:
    if not isinstance(record.get("conversations"), list):
        return ""
    if record.get("bboxes") is not None:
        return "it has 'conversations' and 'bboxes'"
    values = [turn.get("value") for turn in record["conversations"] if isinstance(turn, dict)]
    is_marked = any(isinstance(value, str) and "<lvr>" in value for value in values)
    return "its 'conversations' hold <lvr>" if is_marked else ""


def _read(record: Record) -> Draft:
    turns, images = read_turns(record)
    history, question, reply = last_question(turns)
    if any("<lvr>" in turn.text for turn in history) or "<lvr>" in question:
        raise SampleError("<lvr> stands in another turn than the last reply")
    pieces = _PLACE.split(reply)
    boxes = read_boxes(items(record, "bboxes") if record.get("bboxes") else [])
    if len(boxes) != len(pieces) - 1:
        raise SampleError(f"{len(pieces) - 1} places <lvr> but {len(boxes)} boxes in 'bboxes'")
    if boxes and len(images) not in (1, len(boxes)):
        raise SampleError(f"{len(boxes)} boxes for {len(images)} images: it cannot be told in which each lies")
    places: list[Picture] = images if len(images) == len(boxes) else images * len(boxes)
    return Draft(
        question=question,
        steps=plan_of(pieces),
        input_images=images,
        helper_images=[dataclasses.replace(image, box=box) for image, box in zip(places, boxes, strict=True)],
        answer=stated_answer(reply),
        history=list(history),
        group=short_text(record, "dataset"),
    )


LVR = RecordFormat("lvr", re.compile(f"{OWN_KEYS}|bboxes"), _recognise, _read, FAMILY)
