from __future__ import annotations

import pytest

from ilvr_ds.data.answer_place import last_boxed
from ilvr_ds.data.sample import Sample
from ilvr_ds.evaluation.benchmarks import find_benchmark
from ilvr_ds.evaluation.scoring import (
    RULES,
    clean,
    comt_official,
    exact_match,
    extract_answer,
    ilvr_2026_08,
    is_option_letter,
    macro_mean,
    read_options,
    score_by_type,
)

COLOURS = ["red", "blue", "light blue", "green"]


@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        ("**(B)**", "B", True),
        ("**(B)**", "(B)", True),
        ("**(B)**", "blue", True),
        ("(A) no, wait: (B)", "B", True),
        ("(B), surely not (A)", "B", False),
        ("It is B, but (A) is my answer. C", "A", True),  # parentheses before bare letters, wherever they stand
        ("It becomes blue.", "B", True),
        ("First red, then green", "D", True),
        ("First red, then Green", "D", True),
        ("It is light blue", "C", True),  # not the "blue" in it
        ("It is light blue", "B", False),
        ("It was bored", "A", False),  # not the "red" in it
        ("The option is B.", "B", True),
        ("A or B? B. I'd say D", "D", True),
        ("The answer is: yes.", "B", False),
        ("The final answer is: (b).", "B", True),
        ("A cat is a cat; the final answer is: b", "A", True),  # a capital goes before
        ("B, et non le DÉFI", "B", True),  # no letter of another word, accents or not
        ("", "B", False),
        ("(E)", "B", False),
        ("I cannot tell", "B", False),
    ],
)
def test_option_letter(response: str, answer: str, right: bool) -> None:
    assert is_option_letter(response, answer, COLOURS) is right


@pytest.mark.parametrize("rule", ["comt-official", "option-letter"])
def test_an_answer_that_is_no_option(rule: str) -> None:
    """Catches any option that counts as right there."""
    assert not RULES[rule]("It becomes blue.", "purple", COLOURS)


@pytest.mark.parametrize(("answer", "letter"), [("B", "B"), ("(b)", "B"), ("B) blue", "B"), ("Blue", "B"), ("A", "A")])
def test_comt_official_takes_an_options_text_for_its_letter(answer: str, letter: str) -> None:
    """How the judge reads a reply is in test_comt_judge.py."""
    assert [comt_official(f"({x})", answer, COLOURS) for x in "ABCD"] == [x == letter for x in "ABCD"]


def test_rules_whose_verdicts_follow_a_published_judge_name_it() -> None:
    assert all(rules.version for rules in RULES.values())
    assert RULES["comt-official"].version == "2 (CoMT evaluate.py 0109566)"
    assert [RULES[f"ilvr-script-{commit}"].version[-8:-1] for commit in ("5eff4f9", "13a67ed")] == [
        "5eff4f9",
        "13a67ed",
    ]


@pytest.mark.parametrize(
    ("name", "response", "answer"),
    [
        ("comt", "First green, then red", "D"),
        ("comt", "I cannot tell", ""),
        ("option-letter", "First green, then red", "A"),
        ("ilvr", "The final answer is: **red**", "red"),
        ("exact-match", r"It is \boxed{**two**}.", "two"),
        ("vsp", r"So \boxed{R, D, D}", "R D D"),
    ],
)
def test_the_answer_that_is_shown_is_the_one_that_is_judged(name: str, response: str, answer: str) -> None:
    options = ", ".join(f"{letter}) {text}" for letter, text in zip("ABCD", COLOURS, strict=True))
    assert find_benchmark(name).answer(Sample("a", f"Which? {options}", ()), response) == answer


@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        ("The final answer is: 70°", "70°", True),
        ("The final answer is: 17°", "7°", False),  # whole words only
        ("It is (B)", "B", True),
        ("none", "70°", False),
    ],
)
def test_option_letter_without_options(response: str, answer: str, right: bool) -> None:
    assert is_option_letter(response, answer, []) is right


@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        ("The final answer is: **(B)**", "B", True),
        ("**(B)**", "B", True),
        ("2.0", "2", True),
        (r"\boxed{2.0}", "2", True),
        ("Final answer: 1,000", "1000", True),
        ("The final answer is 2.5", "2", False),
        ("The final answer is: 70", "70°", True),
        ("The answer is: yes.", "yes", True),
        ("The answer is: yes.", "true", True),
        ("The answer is: yes.", "A", True),
        ("Answer: True", "yes", True),
        ("Answer: B", "no", True),
        ("The answer is: yes.", "no", False),
        (r"\boxed{A} or rather \boxed{B}", "B", True),
        (r"\boxed{A} or rather \boxed{B}", "A", False),
        (r"\boxed{\text{Blue}}", "blue", True),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}", True),
        (r"\boxed{C}, and the final answer is D", "C", True),  # the box goes before everything
        ("Answer: C. The final answer is D", "D", True),
        ("The final answer is C.\nThe final answer is D.", "D", True),
        ("The final answer is:\n**Blue circle**.", "blue circle", True),
        ("### Final Answer\nblue", "blue", True),
        ("Final answer is\uff1aB", "B", True),  # a full-width colon, and a full-width stop
        ("The final answer is\uff1aB\u3002", "B", True),
        ("Answer\uff1aB\u3002", "B", True),
        ("Final answer is\uff1aB", "A", False),
        ("", "B", False),
        ("   ", "", False),
        (r"\boxed{}", "", False),
        ("I see a red circle", "B", False),
        (r"cut off \boxed{B", "B", False),
    ],
)
def test_ilvr_2026_08(response: str, answer: str, right: bool) -> None:
    assert ilvr_2026_08(response, answer, []) is right


@pytest.mark.parametrize("rule", RULES)
def test_an_answer_only_in_the_prompt_does_not_count(rule: str) -> None:
    """Nothing of question or options is part of what is judged."""
    for response in ("", "Let me see. ", "I do not know"):
        assert not RULES[rule](response, "B", COLOURS)
        assert not RULES[rule](response, "blue", COLOURS)


def test_cleaning_changes_no_number() -> None:
    """Catches a point or a star that is taken for punctuation or markdown."""
    assert not exact_match("\\boxed{5}", ".5", []) and exact_match("\\boxed{0.5}", ".5", [])
    assert clean("2*3") == "2*3" and clean("**2*3**.") == "2*3" and clean("*a*") == "a"
    assert clean("... .75!") == "0.75" and clean("end.") == "end"


@pytest.mark.parametrize("rule", ["exact-match", "ilvr-2026-08", "option-letter"])
def test_an_accent_may_be_a_letter_of_its_own(rule: str) -> None:
    """Tokenizers write NFC, whatever a record has: answers from a Mac's NFD were never right."""
    composed, apart = "caf\u00e9", "cafe\u0301"
    for given, known in ((composed, apart), (apart, composed)):
        assert RULES[rule](f"The final answer is: {given}.", known, [])
        assert not RULES[rule]("The final answer is: cafe.", known, [])
    assert RULES["option-letter"](f"It is {composed}", "B", ["the", apart])


@pytest.mark.parametrize("sign", ["<", "?", "..."])
def test_an_answer_may_be_a_sign(sign: str) -> None:
    """Catches one that is taken for markdown or punctuation, so that no response is right."""
    for rule in (exact_match, ilvr_2026_08):
        assert rule(f"The answer is: {sign}", sign, []) and not rule("The answer is: =", sign, [])
    assert clean("**") == "**" and clean(" ") == ""


def test_exact_match_folds_neither_numbers_nor_words() -> None:
    assert exact_match("The final answer is: **Paris**.", "Paris", [])
    assert not exact_match("The final answer is: paris", "Paris", [])
    assert not exact_match("2.0", "2", [])
    assert not exact_match("", "", [])


def test_boxes() -> None:
    assert last_boxed("none") is None
    assert last_boxed(r"\boxed{a} \boxed {b{c}d}") == "b{c}d"
    assert last_boxed(r"\boxed{a} \boxed{cut") == "a"
    assert extract_answer(r"**Answer:** B") == " B" or clean(extract_answer(r"**Answer:** B")) == "B"


@pytest.mark.parametrize(
    ("question", "options"),
    [
        ("How many? A) 2 B) 3 C) 5 D) 7", ["2", "3", "5", "7"]),
        ("How many?\nOptions: (A) 2, (B) light blue, (C) 5", ["2", "light blue", "5"]),
        ("Which?\nA. red\nB. blue\n\nAnswer with a letter.", ["red", "blue"]),
        ("Which?\nA) red\nB) light blue,\nAnswer with a letter.", ["red", "light blue"]),
        ("Which? A) red B) blue\nAnswer with a letter.", ["red", "blue"]),
        ("Which?\nA) one\ntwo\nB) two\none", ["one\ntwo", "two\none"]),
        ("A: x B: y", ["x", "y"]),
        ("Plan A. Then what? A) one B) two", ["one", "two"]),
        ("What is the angle?", []),
        ("Plan A. is fine", []),
        ("A) 1 C) 2", []),
    ],
)
def test_options_are_read_from_the_question(question: str, options: list[str]) -> None:
    assert read_options(question) == options


def test_types_count_the_same_in_the_macro_mean() -> None:
    scores = score_by_type([True, True, True, False], ["a", "a", "a", "b"], [4, 4, 2, 0])
    assert (scores["a"].accuracy, scores["a"].samples, scores["b"].right) == (1.0, 3, 0)
    assert scores["a"].chance == pytest.approx((0.25 + 0.25 + 0.5) / 3)
    assert scores["b"].chance is None
    assert macro_mean(scores) == 0.5
