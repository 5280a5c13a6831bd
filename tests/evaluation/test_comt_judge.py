"""CoMT's judge: what the words of its rules say, and a second implementation of the same words."""

from __future__ import annotations

import random

import pytest

from ilvr_ds.evaluation.comt_judge import chosen_letter
from ilvr_ds.evaluation.scoring import comt_official

SHAPES = ["the red triangle", "a blue circle", "triangle", "four"]
NUMBERS = ["3", "13", "5", "15"]


@pytest.mark.parametrize(
    ("options", "reply", "letter"),
    [
        (SHAPES, "I would choose (b).", "B"),
        (SHAPES, "the triangle is next to a blue circle", "C"),  # the last listed, not the last said
        (SHAPES, "The red triangle", "C"),  # which holds "triangle", too
        (SHAPES, "fourteen", "D"),  # inside a word
        (SHAPES, "I choose D because B and A fail", "D"),  # the last in the alphabet, not the last said
        (SHAPES, "B, or else A.", "B"),
        (SHAPES, "**B**", None),
        (SHAPES, "D)", None),
        (SHAPES, "b or a?", "B"),
        (SHAPES, "I see a c", "C"),
        (SHAPES, "A or d", "A"),  # capitals go first
        (SHAPES, "(z) A", "Z"),  # whatever letter it is
        (SHAPES, "( B ) A", "B"),  # not in parentheses, but alone
        (SHAPES, "( B) A", "A"),
        (SHAPES, "(A) four (B) (no)", "B"),
        (SHAPES, "A\tB", None),  # a tab is no blank
        (SHAPES, "A\nB", "B"),
        (SHAPES, "[Answer] (A) ANSWER: (B) ANSWER: D", "D"),
        (SHAPES, "[Answer] (A)", "A"),
        (SHAPES, "(A) ANSWER: D", "A"),  # without [Answer] all is read
        (SHAPES, "ANSWER: B [Answer] (A)", "A"),
        (SHAPES, "ANSWER: B [answer] ANSWER: (A)", "A"),
        (SHAPES, "", None),
        (SHAPES, "none of them", None),
        (NUMBERS, "13 people", "B"),  # "3" occurs in it, "13" is listed later
        (NUMBERS, "It is 15.", "D"),
        (NUMBERS, "3", "A"),
        (NUMBERS, "A: 7", None),
        ([], "four, so D", "D"),
        (["yes", "no"], "C or B", "B"),
    ],
)
def test_the_words_of_the_rules(options: list[str], reply: str, letter: str | None) -> None:
    assert chosen_letter(reply, options) == letter


@pytest.mark.parametrize("reply", ["**B**", "D)", "", "none"])
def test_what_no_rule_reads_is_wrong(reply: str) -> None:
    assert not any(comt_official(reply, letter, SHAPES) for letter in "ABCD")


def slowly(reply: str, options: list[str]) -> str:
    """The rules letter by letter, without patterns; "" where none finds anything."""
    if "[Answer]" in reply:
        while (place := reply.find("ANSWER:")) >= 0:
            reply = reply[place + len("ANSWER:") :]
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    found = ""
    for first, letter, last in zip(reply, reply[1:], reply[2:], strict=False):
        if first == "(" and last == ")" and letter in alphabet + alphabet.lower():
            found = letter.upper()
    if found:
        return found
    for number in range(4):
        text = options[number].lower()
        if any(reply.lower()[start : start + len(text)] == text for start in range(len(reply) + 1)):
            found = "ABCD"[number]
    if found:
        return found
    pieces = [""]
    for character in reply:
        if character in " \n.,!?":
            pieces.append("")
        else:
            pieces[-1] += character
    for letters in ("ABCD", "abcd"):
        for letter in letters:
            if letter in pieces:
                found = letter.upper()
        if found:
            return found
    return ""


def test_a_second_implementation_of_the_words_agrees() -> None:
    """On replies made of what the rules look for; every rule decides at least a hundred of them."""
    rng = random.Random(5)
    words = ["(a)", "(B)", "(Q)", "(7)", "( c )", "A", "b", "C", "d", "D)", "**B**", "[Answer]", "ANSWER:", "Answer:"]
    words += ["the", "I", "triangle", "Red", "four", "13", "3.", "\n", "\t", "a", "blue circle", "é", ""]
    decided = dict.fromkeys(["cut", "in parentheses", "option", "capital", "small", "nothing"], 0)
    for _ in range(20_000):
        options = rng.choice(
            [SHAPES, NUMBERS, rng.sample(["red", "Blue", "light blue", "a", "I", "x y", "13", "3"], 4)]
        )
        reply = "".join(
            rng.choice(words) + rng.choice(["", " ", " ", ".", ", ", "!?"]) for _ in range(rng.randrange(7))
        )
        letter = slowly(reply, options)
        assert (chosen_letter(reply, options) or "") == letter, (reply, options)
        decided[_rule(reply, options, letter)] += 1
        decided["cut"] += "[Answer]" in reply and "ANSWER:" in reply
    assert min(decided.values()) >= 100, decided


def _rule(reply: str, options: list[str], letter: str) -> str:
    """Which rule decided, as far as the letter tells: options are taken away, then capitals."""
    if not letter:
        return "nothing"
    hidden = ["\0"] * 4
    if not (bare := slowly(reply, hidden)) or bare != letter:
        return "option"
    if any(f"({x})" in reply for x in (letter, letter.lower())):
        return "in parentheses"
    return "capital" if letter in reply else "small"
