r"""Monet-SFT (huggingface.co/datasets/NOVAglow646/Monet-SFT-125K; what its training expects of a record:
github.com/NOVAglow646/Monet, src/task.py).

    {"metadata": {"dataset_name": ..., "sample_id": ...},
     "data": [{"role": "system", "content": [{"type": "text", "text": ...}]},
              {"role": "user", "content": [{"type": "image", "image": ...}, {"type": "text", "text": ...}]},
              {"role": "assistant", "content": [{"type": "text", "text": "... <abs_vis_token></abs_vis_token>"},
                                                {"type": "image", "image": ...}, {"type": "text", "text": ...}]}]}

An empty `<abs_vis_token></abs_vis_token>` stands for the next image of the assistant's turn, which becomes a helper
image there. The tags `<observation>` and `</observation>`, which mark what the picture shows, are left out; so is the
system turn, which the published training replaces by the template's own. The answer is in the last `\boxed{}`.
"""

from __future__ import annotations

import re
from typing import Any

from ilvr_ds.data.sample import IMAGE_MARKER, SampleError
from ilvr_ds.ingest.formats.pieces import plan_of, stated_answer
from ilvr_ds.ingest.picture import Picture
from ilvr_ds.ingest.record import Draft, Record, RecordFormat, items, kind, picture, text

_PLACE = re.compile(r"<abs_vis_token>\s*</abs_vis_token>")
_TAG = re.compile(r"</?abs_vis_token[^>]*>")
_OBSERVATION = re.compile(r"</?observation>")
_ROLES = (["user", "assistant"], ["user"])


def _recognise(record: Record) -> str:
    turns = record.get("data")
    first = turns[0] if isinstance(turns, list) and turns else None
    is_turn = isinstance(first, dict) and {"role", "content"} <= first.keys()
    return "its 'data' are turns with 'role' and 'content'" if is_turn else ""


def _read(record: Record) -> Draft:
    turns = [_turn(turn, number) for number, turn in enumerate(items(record, "data"), start=1)]
    turns = turns[1:] if turns[0][0] == "system" else turns
    if [role for role, _ in turns] not in _ROLES:
        found = ", ".join(role for role, _ in turns)
        raise SampleError(f"the turns are {found or 'the system alone'}, expected user and assistant")
    question, inputs = _question(turns[0][1])
    pieces, helpers = _reply(turns[1][1]) if len(turns) > 1 else ([""], [])
    metadata = record.get("metadata")
    group = metadata.get("dataset_name") if isinstance(metadata, dict) else None
    return Draft(
        question=question,
        steps=plan_of(pieces),
        input_images=inputs,
        helper_images=helpers,
        answer=stated_answer("".join(pieces)),
        group=group if isinstance(group, str) else "",
    )


MONET = RecordFormat("monet", re.compile("data"), _recognise, _read)


def _turn(turn: Any, number: int) -> tuple[str, list[Record]]:
    """Role and parts of a turn."""
    try:
        if not isinstance(turn, dict):
            raise SampleError(f"it is {kind(turn)}, expected an object")
        role = text(turn, "role")
        content = turn.get("content")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else items(turn, "content")
        for part in parts:
            if not isinstance(part, dict) or part.get("type") not in ("text", "image"):
                raise SampleError("its 'content' holds a part that is neither of type text nor image")
    except SampleError as error:
        raise SampleError(f"turn {number}: {error}") from error
    return role, parts


def _question(parts: list[Record]) -> tuple[str, list[Picture]]:
    """The user's text with a marker at each image, and the images."""
    words, images = "", []
    for part in parts:
        if part["type"] == "image":
            images.append(picture(part, "image"))
            words += IMAGE_MARKER
        else:
            words += text(part, "text")
    if not words.replace(IMAGE_MARKER, "").strip():
        raise SampleError("the user's turn holds no text")
    return words, images


def _reply(parts: list[Record]) -> tuple[list[str], list[Picture]]:
    """The assistant's text, cut at its helper images, and the images."""
    places, images, words = 0, [], ""
    for part in parts:
        if part["type"] == "image":
            images.append(picture(part, "image"))
            if len(images) > places:
                raise SampleError(f"assistant's image {len(images)} has no <abs_vis_token></abs_vis_token> before it")
        else:
            words += text(part, "text")
            places = len(_PLACE.findall(words))
    if left_over := _TAG.search(_PLACE.sub("", words)):
        raise SampleError(f"'{left_over[0]}' is no part of an empty <abs_vis_token></abs_vis_token>")
    if places != len(images):
        raise SampleError(f"{places} places <abs_vis_token></abs_vis_token> but {len(images)} images of the assistant")
    return _PLACE.split(_OBSERVATION.sub("", words)), images
