"""The answer in a text: the place that a person would underline."""

from __future__ import annotations

import pytest

from ilvr_ds.data.answer_place import find_answer


@pytest.mark.parametrize(
    ("marked", "answer"),
    [
        ("The final answer is: [A]. All others are wrong", "A"),
        ("The final answer is: [A]. A is left of B", "A"),
        ("A is near. The final answer is: [A]. This answer is best", "A"),
        ("The answer is: B. No: the final answer is [C], as C lies there", "C"),
        ("Answer: [up]. The uproar is up there", "up"),
        ("Final answer\uff1a[B]\u3002B...", "B"),
        ("\u7b54\u6848\u662f[B]\u3002", "B"),
        ("\u7b54\u6848\u662f[\u4e09]\u4e2a", "\u4e09"),
        (r"The answer is: A? No, \boxed{[B]}, not B or A", "B"),
        (r"so \boxed{[\frac{1}{2}]} = \frac{1}{2}", r"\frac{1}{2}"),
        ("final answer: 3.5 - 0.5 = [3]", "3"),
        ("final answer: 1,300 - 1000 = [300]", "300"),
        ("A or [A]", "A"),
        ("It is ([B]) here", "B"),
        ("It is [(B)]here", "(B)"),
        ("[70\u00b0] it is", "70\u00b0"),
        ("It was [A]; the final answer is unknown", "A"),
    ],
)
def test_the_answer_is_found_where_it_is_given(marked: str, answer: str) -> None:
    place = marked.index("[" + answer + "]")
    assert find_answer(marked.replace(f"[{answer}]", answer), answer) == (place, place + len(answer))


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is: All", "A"),
        ("gro\u00df", "gro"),
        ("It is 3.5 or 13", "3"),
        ("A", ""),
        ("", "A"),
        ("x_ray", "ray1"),
        ("a cafe\u0301", "cafe"),
        ("cafe\u0301s", "cafe\u0301"),
    ],
)
def test_parts_of_words_and_numbers_are_no_answer(text: str, answer: str) -> None:
    assert find_answer(text, answer) == (-1, -1)


def test_an_accent_may_be_written_in_two_ways() -> None:
    """As one letter, or apart, as on a Mac."""
    whole, apart = "caf\u00e9", "cafe\u0301"
    assert find_answer(f"The answer is: {apart}.", whole) == (15, 20)
    assert find_answer(f"The answer is: {whole}.", apart) == (15, 19)
