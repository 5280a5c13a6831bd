"""Conversations of several turns, written after LLaVA's description, ShareGPT's and chat messages."""

from __future__ import annotations

from typing import Any

import pytest

from ilvr_ds.data.sample import Sample, TextStep, Turn
from tests.data.packing import image_bytes
from tests.ingest.records import read, read_twenty


def said(*values: str, first: str = "human") -> list[dict]:
    roles = ("human", "gpt") if first == "human" else ("gpt", "human")
    return [{"from": roles[n % 2], "value": value} for n, value in enumerate(values)]


def record(n: int, **changes) -> dict:
    made: dict[str, Any] = {
        "id": f"c{n}",
        "image": "a.png",
        "conversations": said(f"<image>\nWhat is {n}?", "A cat.", "Why?", f"It purrs {n} times."),
        "model": "",
    } | changes
    return {key: value for key, value in made.items() if value is not ...}


def test_twenty_records(root):
    broken = [
        (record(20, conversations=said("Hello.", "Hi.", first="gpt")), "does not begin with the user"),
        (record(21, conversations=said("Hi?", "Ho.", "And?")), "the conversation ends with the user: nobody replies"),
        (record(22, conversations=said("Hi?", " ")), "turn 2: 'value' is empty"),
        (record(23, conversations=[{"from": "tool", "value": "x"}]), "turn 1: its role 'tool' is none of human, gpt"),
        (
            record(24, conversations=said("<image><image>?", "x")),
            "2 <image> markers in the question but 1 input images",
        ),
        (record(25, conversations=said("?", "<image>")), "turn 2: an image in a turn of the assistant"),
        (record(26, conversations=[*said("a", "b"), *said("c", "d"), *said("e")]), "ends with the user"),
        (record(27, conversations=[*said("a"), *said("b", "c")]), "do not alternate"),
        (record(28, conversations=[]), "'conversations' is an empty list"),
        (record(29, image="gone.png"), "input image 'gone.png' is missing below"),
        (record(30, conversations=["x"]), "turn 1: it is text, expected an object"),
        (
            record(31, conversations=[*said("a"), {"from": "gpt", "value": "b", "weight": 0}]),
            "turn 2: it has 'weight' 0, but every turn of the assistant is learned from",
        ),
        (
            record(32, conversations=[*said("a"), {"from": "gpt", "value": "b", "loss": False}]),
            "turn 2: it has 'loss' false, but",
        ),
        (
            record(33, conversations=[*said("a"), {"from": "gpt", "value": "b", "tool_calls": [{"id": "1"}]}]),
            "turn 2: it has 'tool_calls', and calls of tools are not read",
        ),
        (
            record(35, conversations=[*said("a"), {"from": "gpt", "value": "b", "reasoning_content": "c"}]),
            "turn 2: it has 'reasoning_content' beside its text, and only the text is learned from",
        ),
        (
            record(36, system="Be short.", conversations=[{"from": "system", "value": "x"}, *said("a", "b")]),
            "a system turn",
        ),
        (record(34, images=["b.png"]), "images stand both in 'image' and in 'images'"),
    ]
    samples = read_twenty(root, [record(n) for n in range(15)], broken)
    for n, sample in enumerate(samples):
        assert sample.id == f"c{n}"
        assert sample.history == (Turn("user", f"<image>What is {n}?"), Turn("assistant", "A cat."))
        assert (sample.question, sample.steps) == ("Why?", (TextStep(f"It purrs {n} times."),))
        assert (sample.input_images, sample.helper_images) == ((image_bytes(0),), ())


def test_a_system_prompt_beside_the_turns_is_the_first_turn(root):
    (sample,) = read(root, record(0, image=..., system="Be short.", conversations=said("a", "b")))
    assert (sample.history, sample.meta) == ((Turn("system", "Be short."),), {"model": ""})


def test_a_turn_that_is_learned_from_may_say_so(root):
    """And that of a user that it is not, as data for other trainers do."""
    asked = {"from": "human", "value": "a", "weight": 0, "train": False}
    turns = [asked, {"from": "gpt", "value": "b", "weight": 1, "loss": None, "tool_calls": None}]
    (sample,) = read(root, record(0, image=..., conversations=turns))
    assert sample.steps == (TextStep("b"),)


def test_images_of_all_turns_are_counted_through(root):
    turns = said("<image>\nThis?", "A.", "And\n<image>\nthis?", "B.")
    (sample,) = read(root, record(0, image=["a.png", "b.png"], conversations=turns))
    assert sample.user_texts == ("<image>This?", "And<image>this?")
    assert sample.input_images == (image_bytes(0), image_bytes(1))
    (bad,) = read(root, record(0, image=["a.png"], conversations=turns))
    assert "2 <image> markers in the user's turns but 1 input images" in bad.reason


def test_chat_messages_with_a_system_turn_and_images_as_parts(root):
    user = [{"type": "image", "image": "b.png"}, {"type": "text", "text": "What?"}]
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": user},
        {"role": "assistant", "content": [{"type": "text", "text": r"\boxed{4}"}]},
    ]
    (sample,) = read(root, {"messages": messages})
    assert sample == Sample(
        id="train-1",
        question="<image>What?",
        steps=(TextStep(r"\boxed{4}"),),
        input_images=(image_bytes(1),),
        answer="4",
        history=(Turn("system", "Be short."),),
    )
    beside, url = read(
        root,
        {"messages": [{"role": "user", "content": [{"type": "image"}, user[1]]}, messages[2]], "images": ["c.png"]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.png"}}, user[1]]}]},
    )
    assert (beside.question, beside.input_images) == ("<image>What?", (image_bytes(2),))
    assert (url.input_images, url.steps) == ((image_bytes(0),), ())


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([{"role": "user", "content": None}], "turn 1: 'content' is null"),
        ([{"role": "user", "content": [{"type": "audio"}]}], "neither text nor an image"),
        ([{"role": "user", "content": [{"type": "image", "image": "https://x.org/a.png"}]}], "is an address; download"),
        ([{"role": "user", "content": "a"}, {"role": "system", "content": "b"}], "ends with the user"),
        ([{"role": "system", "content": "b"}], "does not begin with the user"),
    ],
)
def test_messages_that_are_rejected(root, messages, reason):
    (bad,) = read(root, {"messages": messages})
    assert reason in bad.reason


@pytest.mark.parametrize("key", ["video", "videos", "audio", "audios"])
def test_films_and_sounds_are_rejected(root, key):
    """Catches `<video>` as a word, and a question about what nobody sees."""
    turns = [{"from": "human", "value": f"<{key}>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
    bad, good = read(root, {"conversations": turns, key: ["a"]}, {"conversations": turns, key: []})
    assert bad.reason == f"the record has '{key}', and only images are read; leave it out"
    assert isinstance(good, Sample)


def test_text_alone_and_a_lone_question(root):
    text, question = read(root, record(0, image=...), record(1, conversations=said("<image>Which?")))
    assert isinstance(text, Sample) is False  # its text has a marker
    assert (question.steps, question.question) == ((), "<image>Which?")
    (plain,) = read(root, record(0, image=..., conversations=said("Hi?", "Ho.")))
    assert (plain.history, plain.input_images) == ((), ())
