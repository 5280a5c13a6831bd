"""Keys that are nearly those of a part that is missing: a sample must not lose its images or its answer in silence."""

from __future__ import annotations

from typing import Any

import pytest

from ilvr_ds.data.sample import SampleError
from ilvr_ds.ingest.record_keys import check_keys

WHOLE: dict[str, Any] = {
    "text_input": "Why?", "image_input": "a.png", "sequence_plan": [], "original_final_answer": "A", "group": "g",
}  # fmt: skip


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("image_inputs", "image_input"),
        ("imageInput", "image_input"),
        ("Image_Input", "image_input"),
        ("input_image", "image_input"),
        ("images", "image_input"),
        ("original_answer", "original_final_answer"),
        ("final_answer", "original_final_answer"),
        ("answers", "answer"),
        ("sequence_plans", "sequence_plan"),
        ("text_ouput", "text_output"),
        ("text_inputs", "text_input"),
        ("groups", "group"),
    ],
)
def test_a_near_key_is_an_error_where_its_part_is_missing(key: str, meant: str) -> None:
    missing = {"answer": "original_final_answer", "text_output": "sequence_plan"}.get(meant, meant)
    record = {name: value for name, value in WHOLE.items() if name != missing}
    with pytest.raises(SampleError, match=f"^unknown key '{key}'; did you mean '{meant}', which is missing"):
        check_keys(record | {key: "x"}, has_answer=False)
    check_keys(WHOLE | {key: "x"}, has_answer=False)


def test_an_answer_may_be_known_without_a_key() -> None:
    check_keys({"text_input": "Why?", "original_answer": "x"}, has_answer=True)


def test_a_key_that_holds_nothing_is_missing() -> None:
    with pytest.raises(SampleError, match="image_inputs"):
        check_keys(WHOLE | {"image_input": None, "image_inputs": ["a.png"]}, has_answer=True)


@pytest.mark.parametrize("key", ["map_desc", "url", "image_url", "caption", "idx", "label", "width", "options", "答え"])
def test_foreign_keys_are_free(key: str) -> None:
    check_keys({"text_input": "Why?", key: "x"}, has_answer=False)
