"""Where the answer stands in a text: as whole words, behind the phrase that announces it."""

from __future__ import annotations

import re
from collections.abc import Iterator

_PHRASES = tuple(
    re.compile(phrase, re.IGNORECASE)
    for phrase in (r"\\boxed\s*\{", r"\bfinal\s+answer\b(?:\s+is\b)?", r"\banswer(?:\s+is\b|\s*[:\uff1a])")
)
"""What announces an answer, the surest first."""


def find_answer(text: str, answer: str) -> int:
    """Position of the first `answer` behind the last phrase that announces one, else of the last one; -1 without any.

    Only whole words count: "A" does not stand in "All", nor 3 in 3.5.
    """
    places = list(_whole_words(text, answer)) if answer else []
    for phrase in _PHRASES:
        for found in reversed(list(phrase.finditer(text))):
            if behind := [place for place in places if place >= found.end()]:
                return behind[0]
    return places[-1] if places else -1


def _whole_words(text: str, answer: str) -> Iterator[int]:
    start = text.find(answer)
    while start >= 0:
        end = start + len(answer)
        before, after = text[max(0, start - 2) : start], text[end : end + 2]
        if not _goes_on(answer[0], before[::-1]) and not _goes_on(answer[-1], after):
            yield start
        start = text.find(answer, start + 1)


def _goes_on(edge: str, beside: str) -> bool:
    """Whether a word or a number that has `edge` at its end goes on in `beside`, nearest letter first.

    Scripts without capitals are not told apart by blanks: there no letter makes another one part of a word.
    """
    if not _is_of_a_word(edge) or not beside:
        return False
    is_fraction = edge.isdigit() and beside[0] in ".," and beside[1:].isdigit()
    return _is_of_a_word(beside[0]) or is_fraction


def _is_of_a_word(letter: str) -> bool:
    return letter.isdigit() or letter.lower() != letter.upper()
