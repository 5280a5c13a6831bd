"""Misspelt keys of a record: an unknown key whose name is nearly that of a missing part."""

from __future__ import annotations

import difflib
import re
from typing import Any

from ilvr_ds.data.sample import SampleError

_PARTS = (
    ("text_input",),
    ("image_input",),
    ("sequence_plan", "text_output"),
    ("sequence_plan", "image_output"),
    ("original_final_answer", "answer"),
    ("group", "operation", "type", "level"),
)
"""The parts of a sample, each with the keys that may hold it."""
_SHORTENED = ("image_input", "original_final_answer")
"""Keys also recognised by some of their words: `image`, `final_answer`."""
_SIMILAR = 0.8


def check_keys(record: dict[str, Any], has_answer: bool) -> None:
    """Raise SampleError where a key is nearly that of a part which the record lacks; other unknown keys are free.

    has_answer: the answer is known without a key.
    """
    known = {key for part in _PARTS for key in part}
    unknown = [key for key in record if key not in known]
    for part in _PARTS if unknown else ():
        if any(record.get(key) is not None for key in part) or ("answer" in part and has_answer):
            continue
        for key in unknown:
            if meant := _meant(key, part):
                raise SampleError(f"unknown key '{key}'; did you mean '{meant}', which is missing?")


def _meant(key: str, part: tuple[str, ...]) -> str:
    """The key of `part` that `key` nearly is, whatever the order and spelling of its words; "" if none."""
    spelt = {"_".join(sorted(name.split("_"))): name for name in part}
    words = [word.casefold() for word in re.findall(r"[A-Z]*[^\W_A-Z]+|[A-Z]+", key)]
    if close := difflib.get_close_matches("_".join(sorted(words)), spelt, n=1, cutoff=_SIMILAR):
        return spelt[close[0]]
    singular = {word.removesuffix("s") for word in words}
    return next((name for name in part if name in _SHORTENED and singular and singular < set(name.split("_"))), "")
