"""Visual-CoT's records, written after its README and the benchmark files beside it."""

from __future__ import annotations

import pytest

from ilvr_ds.data.decode import image_size
from ilvr_ds.data.sample import LatentStep
from ilvr_ds.ingest.containers.opening import open_source
from ilvr_ds.ingest.importers import Importer
from tests.data.packing import image_bytes, write_jsonl
from tests.ingest.records import read, read_twenty, shapes

REQUEST = "Please provide the bounding box coordinate of the region that can help you answer the question better."


def record(n: int, **changes) -> dict:
    turns = [
        ("human", f"<image>\nHas bird {n} a blue breast? {REQUEST}"),
        ("gpt", "[0.282, 0.316, 0.794, 0.738]"),
        ("human", "<image>"),
        ("gpt", ("No", "Yes")[n % 2]),
    ]
    made = {
        "dataset": "cub",
        "split": "val",
        "question_id": n,
        "image": ["a.png", "a.png###[1, 2, 5, 6]"],
        "conversations": [{"from": who, "value": value} for who, value in turns],
    } | changes
    return {key: value for key, value in made.items() if value is not ...}


def said(n: int, place: int, value: str) -> dict:
    """The record with other words in one of its turns, counted from 0."""
    made = record(n)
    made["conversations"][place]["value"] = value
    return made


def meta_record(n: int, **changes) -> dict:
    return {
        "question": f"Has bird {n} a grey throat?",
        "answer": "Yes",
        "image": "b.png",
        "width": 8,
        "height": 6,
        "bboxs": [[1.0, 1.0, 3.0, 4.0], [2.0, 0.0, 6.0, 2.0]],
        "dataset": "cub",
        "split": "train",
    } | changes


def test_twenty_records(root):
    turns = record(0)["conversations"]
    broken = [
        (record(20, image=["a.png", "a.png###here"]), "names no box [left, top, right, bottom] behind ###"),
        (
            record(21, image=["a.png", "b.png###[1, 2, 5, 6]"]),
            "the box lies in 'b.png', the question's image is 'a.png'",
        ),
        (record(22, conversations=turns[:2]), "2 turns, expected question, box, the part of the image, answer"),
        (record(23, image=["a.png", "a.png###[20, 2, 25, 6]"]), "lies outside its image of 8x6 pixels"),
        (record(24, image=["a.png###[1, 2, 5, 6]"]), "'image' is not the image and the image with its box"),
        (meta_record(25, bboxs=[]), "'bboxs' is an empty list"),
        (meta_record(26, answer=""), "missing key 'answer'"),
        (meta_record(27, bboxs=[[0.1, 0.2, 0.5, 0.6]]), "the box [0.1, 0.2, 0.5, 0.6] looks like fractions"),
        (record(28, image=["a.png", "a.png###[0.1, 0.2, 0.5, 0.6]"]), "looks like fractions; expected pixels"),
        (
            said(29, 1, "It is on the left: [0.28, 0.3, 0.79, 0.73]"),
            "turn 2 holds more than a box, which would be lost",
        ),
        (said(30, 2, "<image>\nUse one word."), "turn 3 holds more than <image>, which would be lost: '<image>Use one"),
    ]
    good = [record(n) for n in range(10)] + [meta_record(n) for n in range(10, 15)]
    samples = read_twenty(root, good, broken)
    for n, sample in enumerate(samples[:10]):
        assert sample.question == f"<image>Has bird {n} a blue breast?"
        assert shapes(sample) == [0, ("No", "Yes")[n % 2]]
        assert sample.input_images == (image_bytes(0),)
        assert [image_size(helper) for helper in sample.helper_images] == [(4, 4)]
        assert (sample.answer, sample.group, sample.history) == (("No", "Yes")[n % 2], "cub", ())
    for n, sample in enumerate(samples[10:], start=10):
        assert sample.question == f"Has bird {n} a grey throat?"
        assert sample.input_images == (image_bytes(1),)
        assert [image_size(helper) for helper in sample.helper_images] == [(5, 4)], "the box around all boxes"


@pytest.mark.parametrize(("made", "region"), [(record(0), (1, 2, 5, 6)), (meta_record(0), (1, 0, 6, 4))])
def test_boxes_are_pixels(root, made, region):
    source = write_jsonl(root.parent / "train.jsonl", [made])
    ((_, sample),) = Importer(open_source(source), root, helper="region")
    assert sample.steps[0] == LatentStep(0, region)
    assert sample.helper_images == sample.input_images


def test_a_mixture_with_plain_conversations_is_one_file(root):
    """As its own file of two million records is."""
    plain = record(1, image="a.png", conversations=record(1)["conversations"][:2])
    boxed, chat = read(root, record(0), plain)
    assert len(boxed.helper_images) == 1 and chat.helper_images == ()
    assert chat.question == f"<image>Has bird 1 a blue breast? {REQUEST}"


def test_what_stands_behind_the_request_for_a_box_is_kept(root):
    (sample,) = read(root, said(0, 0, f"<image>\nIs it blue? {REQUEST}\nAnswer in one word."))
    assert sample.question == "<image>Is it blue? \nAnswer in one word."
