"""Monet-SFT's records, written after what its published training expects."""

from __future__ import annotations

import pytest

from tests.data.packing import image_bytes
from tests.ingest.records import read, read_twenty, shapes

PLACE = "<abs_vis_token></abs_vis_token>"


def words(content: str) -> dict:
    return {"type": "text", "text": content}


def shown(path: str) -> dict:
    return {"type": "image", "image": path}


def record(n: int, reply: list[dict] | None = None, **changes) -> dict:
    reply = reply or [
        words(f"Zoom in. {PLACE}"),
        shown("b.png"),
        words(f"<observation>A sign.</observation> Then {PLACE}"),
        shown("c.png"),
        words(rf"It says {n}: \boxed{{{n}}}"),
    ]
    turns = [
        {"role": "system", "content": [words("You are a helpful assistant.")]},
        {"role": "user", "content": [shown("a.png"), words(f"What does sign {n} say?")]},
        {"role": "assistant", "content": reply},
    ]
    return {"metadata": {"dataset_name": f"set-{n % 2}", "sample_id": n}, "data": turns} | changes


def test_twenty_records(root):
    turns = record(0)["data"]
    broken = [
        (
            record(20, [words("No place."), shown("b.png")]),
            "assistant's image 1 has no <abs_vis_token></abs_vis_token>",
        ),
        (record(21, [words(f"{PLACE} x {PLACE}"), shown("b.png")]), "2 places <abs_vis_token></abs_vis_token> but 1"),
        (record(22, data=[*turns, *turns[1:]]), "the turns are user, assistant, user, assistant, expected user and"),
        (record(23, data=[turns[0], {"role": "user"}]), "turn 2: missing key 'content'"),
        (record(24, [{"type": "video", "video": "x"}]), "turn 3: its 'content' holds a part that is neither"),
        (record(25, [words(PLACE), shown("gone.png")]), "helper image 'gone.png' is missing below"),
        (record(28, [words("<abs_vis_token>x</abs_vis_token>")]), "'<abs_vis_token>' is no part of an empty <abs_vis_"),
        (record(26, data=[turns[0]]), "the turns are the system alone"),
        (record(27, data=[turns[0], {"role": "user", "content": [shown("a.png")]}]), "the user's turn holds no text"),
    ]
    samples = read_twenty(root, [record(n) for n in range(15)], broken)
    for n, sample in enumerate(samples):
        assert sample.question == f"<image>What does sign {n} say?"
        assert shapes(sample) == ["Zoom in. ", 0, "A sign. Then ", 1, rf"It says {n}: \boxed{{{n}}}"]
        assert (sample.input_images, sample.helper_images) == ((image_bytes(0),), (image_bytes(1), image_bytes(2)))
        assert (sample.answer, sample.group, sample.history) == (str(n), f"set-{n % 2}", ())


def test_a_question_alone_is_for_evaluation(root):
    (sample,) = read(root, record(0, data=record(0)["data"][:2]))
    assert sample.steps == () and sample.input_images == (image_bytes(0),)


@pytest.mark.parametrize("metadata", [None, {"sample_id": 3}, "text"])
def test_metadata_may_say_nothing(root, metadata):
    (sample,) = read(root, record(0, metadata=metadata))
    assert sample.group == ""
