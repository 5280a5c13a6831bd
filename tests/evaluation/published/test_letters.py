"""Each rule on replies whose letter its description decides; the harnesses themselves are asked in a drill."""

from __future__ import annotations

import pytest

from ilvr_ds.evaluation.published import letters

COLOURS = ["red", "blue", "light blue", "white"]


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("B", "B"), (" b.", "B"), ("(c) it is", "C"), ("Blue", "B"), ("The answer is: D", "D"), ("option\nC", "C"),
        ("It is (A), not (B)", "A"), ("I take C) here", "C"), ("I would go for D here", "D"),
        ("It lies in room 1D", "D"), ("", ""), ("No", ""), ("The answer is blue", "B"), ("x BB", ""),
    ],
)  # fmt: skip
def test_vstar(reply: str, letter: str) -> None:
    assert letters.vstar(reply, COLOURS) == letter


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("A", "A"), ("(b).", "B"), ("b) open", "B"), ("B. open", "B"), ("A cat", "A"), ("the answer is (b", "B"),
        ("Option a1", "A"), ("Grab it", "B"), ("Apple", "A"), ("C", ""), ("", ""), ("open", ""),
    ],
)  # fmt: skip
def test_mmvp(reply: str, letter: str) -> None:
    assert letters.mmvp(reply, COLOURS[:2]) == letter


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("B", "B"), ("(b) two", "B"), ("( ( C", "C"), ("The answer is (B)", "B"), ("", ""), ("1", ""), ("**B**", ""),
        ("c).", "C"), ("answers: a, then answer - D", "D"), ("I see (a), and I take (C)", "C"), ("Blue", "B"),
        ("E", ""), ("The answer is blue", ""), ("answer is E", "A"),
    ],
)  # fmt: skip
def test_blink(reply: str, letter: str) -> None:
    assert letters.blink(reply, COLOURS) == letter


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("B", "B"), ("The best answer is C", "C"), ("Best answer: C", "C"), ("After all it is B", "A"), ("", "A"),
        ("d", "D"), ("(b", "B"), ("none of them", ""), ("it is one two three four five six seven eight nine", ""),
        ("The answer is", "A"), ("The answer is b", ""),
    ],
)  # fmt: skip
def test_mme_realworld(reply: str, letter: str) -> None:
    assert letters.mme_realworld(reply, COLOURS) == letter


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("B", "B"), ("(B)", "B"), ("It is B.", "B"), ("A or B", ""), ("I say A, since it is the only one", ""),
        ("The correct answer is **B**, as A is the sky and all the rest is sea", "B"), ("It is white", "D"),
        ("blue", "B"), ("light blue", ""), ("Z", "Z"), ("Cannot determine the answer B", "Z"),
        ("Failed to obtain answer via API. B", ""), ("E", ""), ("white " * 10, ""), ("", ""),
    ],
)  # fmt: skip
def test_exact_matching(reply: str, letter: str) -> None:
    assert letters.exact_matching(reply, COLOURS) == letter
