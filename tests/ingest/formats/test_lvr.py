"""LVR's records, written after the README of its repository."""

from __future__ import annotations

import pytest

from ilvr_ds.data.decode import image_size
from ilvr_ds.data.sample import LatentStep, TextStep
from ilvr_ds.ingest.containers.opening import open_source
from ilvr_ds.ingest.importers import Importer
from tests.data.packing import image_bytes, write_jsonl
from tests.ingest.records import read, read_twenty, shapes

ANSWER = "<answer> The child wears {}. </answer>"


def record(n: int, reply: str | None = None, **changes) -> dict:
    made = {
        "dataset": ("flickr30k", "gqa")[n % 2],
        "split": "train",
        "question_id": 7,
        "image": ["a.png"],
        "conversations": [
            {"from": "human", "value": f"<image>\nWhat does child {n} wear?\nProvide a short and direct response."},
            {"from": "gpt", "value": reply or f"<lvr>\n{ANSWER.format(n)}"},
        ],
        "bboxes": [[0.25, 0.5, 0.75, 1.0]],
    } | changes
    return {key: value for key, value in made.items() if value is not ...}


def test_twenty_records(root):
    asked = record(0)["conversations"][:1]
    broken = [
        (record(20, bboxes=[]), "1 places <lvr> but 0 boxes in 'bboxes'"),
        (record(21, bboxes=[[0.5, 0.5, 0.2, 0.9]]), "lies outside its image of 8x6 pixels"),
        (record(22, bboxes=[[1, 2, 3]]), "box [1, 2, 3] is not [left, top, right, bottom]"),
        (record(23, conversations=[*asked, *asked]), "the conversation ends with the user"),
        (record(24, image=["a.png", "b.png", "c.png"]), "1 boxes for 3 images"),
        (record(25, bboxes=...), "1 places <lvr> but 0 boxes"),
        (record(26, image=["gone.png"]), "input image 'gone.png' is missing below"),
        (record(28, bboxes=[[0, 0, 1, 1.1]]), "cannot be told whether the box [0, 0, 1, 1.1] is in fractions or"),
        (record(27, bboxes=[[20, 1, 30, 5]]), "box [20, 1, 30, 5] in pixels lies outside its image of 8x6 pixels"),
    ]
    samples = read_twenty(root, [record(n) for n in range(15)], broken)
    for n, sample in enumerate(samples):
        assert sample.question == f"<image>What does child {n} wear?\nProvide a short and direct response."
        assert shapes(sample) == [0, ANSWER.format(n)]
        assert sample.input_images == (image_bytes(0),)
        assert [image_size(helper) for helper in sample.helper_images] == [(4, 3)]
        assert (sample.answer, sample.group) == (f"The child wears {n}.", ("flickr30k", "gqa")[n % 2])
        assert sample.meta == {"dataset": sample.group, "split": "train", "question_id": "7"}


def test_boxes_make_crops_or_regions(root):
    """In fractions, which rounding may bring above 1, or in pixels."""
    source = write_jsonl(root.parent / "train.jsonl", [record(0), record(1, bboxes=[[2, 3, 6, 9.5]])])
    found = [sample for _, sample in Importer(open_source(source), root, helper="region")]
    assert [sample.steps[0] for sample in found] == [LatentStep(0, (2, 3, 6, 6)), LatentStep(0, (2, 3, 6, 6))]
    assert all(sample.helper_images == sample.input_images for sample in found)
    source = write_jsonl(root.parent / "train.jsonl", [record(2, bboxes=[[0.25, 0.5, 1.004, 1.01]])])
    ((_, rounded),) = Importer(open_source(source), root, helper="region")
    assert rounded.steps[0] == LatentStep(0, (2, 3, 8, 6))
    assert [sample.steps[0] for sample in read(root, record(0))] == [LatentStep(0)]


def test_several_boxes_lie_in_one_image_or_one_in_each(root):
    reply = "First <lvr> then\n<lvr>\nso."
    boxes = [[0, 0, 0.5, 0.5], [0, 0, 1, 1]]
    question = [{"from": "human", "value": "<image><image>Same?"}, {"from": "gpt", "value": reply}]
    one, two = read(
        root, record(0, reply, bboxes=boxes), record(1, bboxes=boxes, image=["a.png", "b.png"], conversations=question)
    )
    assert shapes(one) == shapes(two) == ["First ", 0, " then", 1, "so."]
    assert [image_size(helper) for helper in one.helper_images] == [(4, 3), (8, 6)]
    assert two.input_images == (image_bytes(0), image_bytes(1))


def test_latents_in_an_earlier_turn_are_refused(root):
    turns = record(0)["conversations"]
    (bad,) = read(root, record(0, conversations=[*turns, *turns]))
    assert "another turn than the last reply" in bad.reason


def test_records_without_boxes_are_conversations_beside_them(root):
    """LVR's second stage, and mixtures: one family, one file."""
    plain = record(1, "<answer>4</answer>", bboxes=...)
    first, second = read(root, record(0), plain)
    assert len(first.helper_images) == 1
    assert (second.steps, second.answer) == ((TextStep("<answer>4</answer>"),), "4")
    (bad,) = read(root, record(0, "x"), format="lvr")
    assert "0 places <lvr> but 1 boxes" in bad.reason


@pytest.mark.parametrize(
    ("corners", "reason"),
    [([float("nan"), 0, 1, 1], "is not [left"), ([0, 0, 0, 1], "lies outside its image"), ([0, 0, 1, "1"], "is not")],
)
def test_boxes_that_are_none_are_refused(root, corners, reason):
    (bad,) = read(root, record(0, bboxes=[corners]))
    assert reason in bad.reason


def test_a_turn_about_two_images_without_a_box(root):
    """In tables a row without boxes may hold an empty list of them."""
    turns = [{"from": "human", "value": "<image><image>Same?"}, {"from": "gpt", "value": "<answer> No </answer>"}]
    (sample,) = read(root, record(0, image=["a.png", "b.png"], conversations=turns, bboxes=[]))
    assert sample.input_images == (image_bytes(0), image_bytes(1)) and not sample.helper_images
