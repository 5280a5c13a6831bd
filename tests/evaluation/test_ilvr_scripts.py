"""The rules of ILVR's released scripts: where they differ from each other, and from `ilvr-2026-08`."""

from __future__ import annotations

import pytest

from ilvr_ds.evaluation.scoring import RULES

JANUARY, LATER, OURS = "ilvr-script-5eff4f9", "ilvr-script-13a67ed", "ilvr-2026-08"


@pytest.mark.parametrize(
    ("response", "answer", "january", "later", "ours"),
    [
        ("The final answer is: 70°", "70°", True, True, True),
        ("Final answer is\uff1aB", "B", True, True, True),  # a full-width colon
        ("Answer\uff1ayes", "true", True, True, True),
        ("answer\uff1a B\uff1a", "B", False, True, True),
        ("So I would say yes to that.", "yes", True, True, False),  # one lone word
        ("So I would say yes to that.", "A", True, True, False),
        ("It is false", "no", True, True, False),
        ("Take B here", "B", True, True, False),
        ("yes, or rather no", "yes", False, False, False),  # two of them
        ("yes, yes", "yes", False, False, False),
        ("Yes.", "yes", True, True, True),
        ("Is that a problem?", "yes", True, True, False),  # the article is an "a"
        ("The final answer is blue", "blue", False, True, True),  # no colon
        ("The final answer is: Blue", "blue", False, True, True),  # letter case
        ("The final answer is: blue.", "blue", False, True, True),
        ("The final answer is: 2.0", "2", False, True, True),
        ("The final answer is: 1,000", "1000", False, True, True),
        ("The final answer is: 70", "70°", False, False, True),  # units
        ("The final answer is: 1.\nThe final answer is: 2", "2", False, True, True),  # the first, the last
        ("The final answer is: 1\nThe final answer is: 2", "1", True, False, False),
        ("Answer: 1\nFinal answer: 2", "2", True, True, True),
        ("The answer: 3", "3", True, True, True),
        (r"The final answer is: \boxed{7}", "7", False, True, True),
        (r"\boxed{\text{Blue}}", "blue", False, False, True),  # braces inside
        ("**blue**", "blue", False, True, True),
        ("blue", "blue", True, True, True),
        ("Which one? blue", "blue", False, False, False),
        ("The final answer is: inf", "inf", True, True, True),
        ("The final answer is: B</s>", "B", False, True, False),
        ("", "B", False, False, False),
    ],
)
def test_each_script_judges_as_it_does(response: str, answer: str, january: bool, later: bool, ours: bool) -> None:
    verdicts = {rule: RULES[rule](response, answer, []) for rule in (JANUARY, LATER, OURS)}
    assert verdicts == {JANUARY: january, LATER: later, OURS: ours}


@pytest.mark.parametrize(
    ("response", "january", "later"),
    [
        ("Answer: **2**, surely\nAnswer: (3).", "**2**, surely", "3"),
        ("Final answer: 1\r2", "1", "1"),
        ("say no", "no", "no"),
        (" two lines\nhere ", "two lines\nhere", "two lines"),
    ],
)
def test_what_is_taken_for_the_answer(response: str, january: str, later: str) -> None:
    assert RULES[JANUARY].read(response, []) == january
    assert RULES[LATER].read(response, []) == later
