"""Mirage's format, and everything that can be wrong with its records."""

import pytest

from ilvr_ds.data.sample import LatentStep, TextStep
from tests.ingest.records import read


@pytest.mark.parametrize(
    ("output", "images", "steps"),
    [
        ("<think>x</think><output_image><think>y</think>", "b.png", ("<think>x</think>", 0, "<think>y</think>")),
        ("x <image>\n", "b.png", ("x ", 0, "\n")),
        ("no marker", "b.png", (0, "no marker")),
        ("no marker", ["b.png", "c.png"], (0, 1, "no marker")),
        ("<output_image>x<output_image>", ["b.png", "c.png"], (0, "x", 1)),
        ("only text", ..., ("only text",)),
    ],
)
def test_mirage_helper_image_stands_at_its_marker_or_first(root, output, images, steps):
    record = {"text_input": "Why?", "text_output": output} | ({} if images is ... else {"image_output": images})
    (sample,) = read(root, record)
    assert sample.steps == tuple(TextStep(s) if isinstance(s, str) else LatentStep(s) for s in steps)
    assert len(sample.helper_images) == sum(isinstance(s, int) for s in steps)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"is \boxed{A}.", "A"),
        (r"\boxed{A} no, \boxed{ \frac{1}{2} } end", r"\frac{1}{2}"),
        (r"\boxed{A", ""),
        ("none", ""),
    ],
)
def test_mirage_answer_is_the_last_box(root, text, answer):
    (sample,) = read(root, {"text_input": "Why?", "text_output": text, "image_output": "b.png"})
    assert sample.answer == answer


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"text_output": "a<image>b<image>c"}, "2 image markers in 'text_output' but 1 in 'image_output'"),
        ({"image_output": None, "text_output": "a<output_image>"}, "1 image markers in 'text_output' but 0"),
        ({"text_output": None}, "'text_output' is null"),
        ({"text_output": ""}, "'text_output' is empty"),
        ({"image_output": "no.png"}, "helper image 'no.png' is missing"),
    ],
)
def test_rejected_mirage_records(root, changes, reason):
    (bad,) = read(root, {"text_input": "Why?", "image_output": "b.png", "text_output": "x"} | changes)
    assert reason in bad.reason
