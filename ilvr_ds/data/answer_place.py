"""Finds the answer in a text: as whole words, behind the phrase that announces it."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

_PHRASES = tuple(
    re.compile(phrase, re.IGNORECASE)
    for phrase in (r"\\boxed\s*\{", r"\bfinal\s+answer\b(?:\s+is\b)?", r"\banswer(?:\s+is\b|\s*[:\uff1a])")
)
"""What announces an answer, the most reliable first."""


def find_answer(text: str, answer: str) -> tuple[int, int]:
    """Where the first `answer` behind the last phrase that announces one begins and ends, else the last `answer`.

    (-1, -1) without one. Only whole words count: neither the "A" of "All" nor the 3 of 3.5. Text and answer may be
    written in two forms of Unicode, as where one comes from a Mac, and then are not of one length.
    """
    forms = [answer, *(unicodedata.normalize(form, answer) for form in ("NFC", "NFD"))]
    found = ((start, start + len(form)) for form in forms if (start := _find(text, form)) >= 0)
    return next(found, (-1, -1))


def _find(text: str, answer: str) -> int:
    """Position of the answer in this form; -1 without one."""
    places = list(_whole_words(text, answer)) if answer else []
    for phrase in _PHRASES:
        for found in reversed(list(phrase.finditer(text))):
            if behind := [place for place in places if place >= found.end()]:
                return behind[0]
    return places[-1] if places else -1


def last_boxed(text: str) -> str | None:
    r"""What stands in the last whole `\boxed{...}`, braces inside it balanced."""
    for start in reversed([match.end() for match in re.finditer(r"\\boxed\s*\{", text)]):
        depth = 1
        for position in range(start, len(text)):
            depth += (text[position] == "{") - (text[position] == "}")
            if depth == 0:
                return text[start:position]
    return None


def _whole_words(text: str, answer: str) -> Iterator[int]:
    start = text.find(answer)
    while start >= 0:
        end = start + len(answer)
        before, after = text[max(0, start - 2) : start], text[end : end + 2]
        if not _continues(answer[0], before[::-1]) and not _continues(answer[-1], after):
            yield start
        start = text.find(answer, start + 1)


def _continues(edge: str, beside: str) -> bool:
    """Whether a word or number that ends in `edge` goes on in `beside`, nearest letter first.

    Scripts without capitals do not separate words by blanks: there a neighbouring letter says nothing.
    """
    if not _is_word_letter(edge) or not beside:
        return False
    is_fraction = edge.isdigit() and beside[0] in ".," and beside[1:].isdigit()
    return _is_word_letter(beside[0]) or is_fraction


def _is_word_letter(letter: str) -> bool:
    return letter.isdigit() or letter.lower() != letter.upper() or bool(unicodedata.combining(letter))
