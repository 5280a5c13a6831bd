"""Zebra-CoT's records, written after the card of the data set."""

from __future__ import annotations

import base64

import pytest

from tests.data.packing import image_bytes
from tests.ingest.records import read, read_twenty, shapes

MARK = "<image_start>[{}]<image_end>"


def record(n: int, **changes) -> dict:
    made = {
        "Question": f"Where is piece {n}? {MARK.format('problem_image_1')}",
        "Text Reasoning Trace": f"THOUGHT 0: Turn it.\n{MARK.format('reasoning_image_1')}\n"
        f"THOUGHT 1: Fit it.\n{MARK.format('reasoning_image_2')}\nTHOUGHT 2: It fits.",
        "Final Answer": f"slot {n}",
        "problem_image_1": "a.png",
        "reasoning_image_1": {"bytes": base64.b64encode(image_bytes(n)).decode(), "path": "x.png"},
        "reasoning_image_2": "b.png",
        "reasoning_image_3": None,
    } | changes
    return {key: value for key, value in made.items() if value is not ...}


def test_twenty_records(root):
    broken = [
        (record(20, **{"reasoning_image_2": None}), "'reasoning_image_2' is named in the text but holds no image"),
        (record(21, **{"reasoning_image_3": "c.png"}), "'reasoning_image_3' is named neither in the question nor"),
        (record(22, **{"Final Answer": ""}), "missing key 'Final Answer'"),
        (record(23, **{"Text Reasoning Trace": 5}), "'Text Reasoning Trace' is a number"),
        (record(24, Question=...), "missing key 'Question'"),
        (record(25, **{"problem_image_1": "gone.png"}), "input image 'gone.png' is missing below"),
        (
            record(27, **{"Final Answer": MARK.format("reasoning_image_1")}),
            "'Final Answer' names an image, expected text",
        ),
        (
            record(28, Question="Where? <image_start>problem_image_1<image_end>"),
            "'<image_start>' names no image in the",
        ),
        (
            record(29, Question="In [problem_image_1, problem_image_2]?"),
            "'[problem_image_1, problem_image_2' names no image",
        ),
        (record(26, **{"problem_image_2": "b.png"}), "'problem_image_2' is named neither"),
    ]
    samples = read_twenty(root, [record(n) for n in range(15)], broken)
    for n, sample in enumerate(samples):
        assert sample.question == f"Where is piece {n}? <image>"
        assert shapes(sample) == ["Turn it.\n", 0, "\nFit it.\n", 1, "\nIt fits.", f"\nThe final answer is: slot {n}"]
        assert sample.input_images == (image_bytes(0),)
        assert sample.helper_images == (image_bytes(n), image_bytes(1))
        assert (sample.answer, sample.meta) == (f"slot {n}", {})


def test_problem_images_stand_first_where_the_question_names_none(root):
    plain = record(0, Question="Where?", problem_image_2="b.png")
    (sample,) = read(root, plain)
    assert (sample.question, sample.input_images) == ("Where?", (image_bytes(0), image_bytes(1)))


def test_a_problem_image_in_the_trace_is_a_helper_there(root):
    trace = "THOUGHT 0: Here: <image_start>[problem_image_1]<image_end> and [reasoning_image_1] so."
    (sample,) = read(root, record(3, **{"Text Reasoning Trace": trace, "reasoning_image_2": None}))
    assert shapes(sample)[:-1] == ["Here: ", 0, " and ", 1, " so."]
    assert sample.helper_images == (image_bytes(0), image_bytes(3))


@pytest.mark.parametrize("label", ["THOUGHT 0: ", "THOUGHT 12:", "THOUGHT_3: "])
def test_labels_of_thoughts_are_left_out(root, label):
    trace = f"{label}Look. [reasoning_image_1] THOUGHT it over. [reasoning_image_2]"
    (sample,) = read(root, record(0, **{"Text Reasoning Trace": trace}))
    assert shapes(sample)[:-1] == ["Look. ", 0, " THOUGHT it over. ", 1]
