"""CoMT's original data (github.com/czhhzc/CoMT, README: the structure of the data set).

    {"id": ..., "type": "deletion", "question": ..., "option": [..., ...], "answer": "B",
     "image": {"IMAGE0": "20001", "IMAGE1": "20001-1"}, "rationale": "... [IMAGE1] ...", "annotations": ...}

The README writes `image` as a list of `IMAGE0:ID`; an object, and its text, are read as well. The file of an image is
`images/TYPE/ID` with one of IMAGE_ENDINGS, beside `data.jsonl`. An image that the rationale names becomes a helper
image where it is named. Input images are those that the question names, and IMAGE0 unless the rationale names it.
"""

from __future__ import annotations

import json
import re

from ilvr_ds.data.sample import IMAGE_MARKER, SampleError, Step, TextStep
from ilvr_ds.ingest.formats.pieces import announced, plan_of
from ilvr_ds.ingest.picture import Picture
from ilvr_ds.ingest.record import Draft, Record, RecordFormat, items, kind, picture, short_text, text

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
_ENTRY = re.compile(r"IMAGE[-_ ]?(\d+)\W{0,3}?:\W{0,3}([^\s'\",\]}]+)")
_NAMED = re.compile(r"([\[<({]{1,2})?\bIMAGE[-_ ]?(\d+)\b(?(1)(?::\s*[^\s\]>)}]+)?[\]>)}]{1,2})")
"""The brackets belong to the name where they surround nothing else."""
_KEY = re.compile(r"IMAGE[-_ ]?(\d+)")
_LETTERS = "ABCDEFGHIJ"


def _recognise(record: Record) -> str:
    return "it has 'question', 'option' and 'rationale'" if {"question", "option", "rationale"} <= record.keys() else ""


def _read(record: Record) -> Draft:
    images = _images(record)
    question = text(record, "question")
    options = _options(record)
    answer = _letter(record, len(options))
    rationale = short_text(record, "rationale").strip()
    asked, told = ([found[2] for found in _NAMED.finditer(words)] for words in (question, rationale))
    shown = asked or (["0"] if "0" in images and "0" not in told else [])
    _check_named(images, [*asked, *told], {*shown, *told}, has_rationale=bool(rationale))
    lines = [f"({letter}) {option}" for letter, option in zip(_LETTERS, options, strict=False)]
    return Draft(
        question="\n".join([_NAMED.sub(IMAGE_MARKER, question), *lines]),
        steps=_steps(rationale, answer),
        input_images=[images[number] for number in shown],
        helper_images=[images[number] for number in told],
        answer=answer,
    )


COMT = RecordFormat("comt", re.compile("question|image|rationale|answer"), _recognise, _read)


def _images(record: Record) -> dict[str, Picture]:
    """The images by number."""
    value = record.get("image")
    if value is None:
        return {}
    if not isinstance(value, (dict, list, str)):
        raise SampleError(f"'image' is {kind(value)}, expected IMAGE0, IMAGE1, ... with their ids")
    inside, value = _inside(value) if isinstance(value, dict) else ({}, value)
    entries = _ENTRY.findall(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    if not entries and value:
        raise SampleError("'image' names no IMAGE0, IMAGE1, ... with an id")
    folder = text(record, "type") if entries else ""
    images = inside | {number: Picture(_places(folder, identity)) for number, identity in entries}
    if len(images) < len(inside) + len(set(entries)):
        raise SampleError("'image' gives two images one number")
    return images


def _inside(value: Record) -> tuple[dict[str, Picture], Record]:
    """The images that the record holds itself, by number, and the others' ids; null is absent."""
    images, ids = {}, {}
    for key, item in value.items():
        is_id = isinstance(item, int) or (isinstance(item, str) and picture(value, key).data is None)
        if is_id:
            ids[key] = item
        elif item is not None:
            if not (found := _KEY.fullmatch(key)):
                raise SampleError(f"'image' holds '{key}', expected IMAGE0, IMAGE1, ...")
            images[found[1]] = picture(value, key)
    return images, ids


def _places(folder: str, identity: str) -> tuple[str, ...]:
    endings = ("",) if identity.lower().endswith(IMAGE_ENDINGS) else IMAGE_ENDINGS
    return tuple(f"{parent}{folder}/{identity}{ending}" for ending in endings for parent in ("images/", ""))


def _options(record: Record) -> list[str]:
    options = [short_text({"option": option}, "option") for option in items(record, "option")]
    if not all(option.strip() for option in options):
        raise SampleError("an option is empty")
    if len(options) > len(_LETTERS):
        raise SampleError(f"{len(options)} options, {len(_LETTERS)} are allowed")
    return options


def _letter(record: Record, options: int) -> str:
    """The answer as a letter; a number counts options from 0, as in the published judge."""
    answer = short_text(record, "answer").strip()
    if not answer:
        raise SampleError("missing key 'answer'")
    letters = _LETTERS[:options]
    found = letters[int(answer)] if answer.isdecimal() and int(answer) < options else answer.strip("()").upper()
    if len(found) != 1 or found not in letters:
        raise SampleError(f"the answer '{answer}' is none of the options {', '.join(letters)}")
    return found


def _check_named(images: dict[str, Picture], named: list[str], used: set[str], has_rationale: bool) -> None:
    """Raise SampleError for names without an image, and images that would be lost; without a rationale its own are."""
    if missing := [number for number in named if number not in images]:
        raise SampleError(f"IMAGE{missing[0]} is named in the text but is not in 'image'")
    if unused := [number for number in images if number not in used and (has_rationale or number == "0")]:
        raise SampleError(f"IMAGE{unused[0]} is named neither in the question nor in the rationale")


def _steps(rationale: str, answer: str) -> list[Step]:
    """The rationale and the answer; none, for a sample to evaluate on, without a rationale."""
    if not rationale:
        return []
    return [*plan_of(_NAMED.split(rationale)[::3]), TextStep(f"\n{announced(f'({answer})')}")]
