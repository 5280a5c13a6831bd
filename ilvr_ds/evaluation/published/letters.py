"""The letter that a reply is taken for: rules of the field's harnesses, as they are, quirks included.

`lmms-eval` is https://github.com/EvolvingLMMs-Lab/lmms-eval, 0.7.3; `VLMEvalKit` is
https://github.com/open-compass/VLMEvalKit of August 2026 under its policy `exact_matching`, which asks no other model.
A drill compares each rule with the harness itself (tests/evaluation/harness).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_UPPER = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def vstar(reply: str, options: Sequence[str]) -> str:
    """lmms-eval, tasks/vstar_bench: the first of these that is found, in either case.

    The reply's first letter; a letter that "answer", "choice" or "option" (and "is") is followed by, after blanks or
    colons; a letter in parentheses; a letter before . ) or ]; a letter between blanks; the only letter A to D there is.
    A to D may begin a word in the first two.
    """
    text = reply.strip().upper()
    for pattern in _VSTAR:
        if found := pattern.search(text):
            return found[1]
    letters = re.findall("[A-D]", text)
    return letters[0] if len(letters) == 1 else ""


_VSTAR = tuple(
    re.compile(pattern)
    for pattern in (
        r"\A([A-D])",
        r"(?:ANSWER|CHOICE|OPTION)(?:\s+IS)?[\s:]+([A-D])",
        r"\(([A-D])\)",
        r"([A-D])\s*[.)\]]",
        r"(?:\A|\s)([A-D])(?:\s|\Z)",
    )
)


def mmvp(reply: str, options: Sequence[str]) -> str:
    """lmms-eval, tasks/mmvp: the first of these that is found, in either case.

    A or B, in parentheses or not, as the whole reply; at its start, before a dot or a blank; after "answer is"; after
    "option"; anywhere before a blank or the end, as part of a word too; as its first letter.
    """
    text = reply.strip()
    for pattern in _MMVP:
        if found := pattern.search(text):
            return found[1].upper()
    return text[:1].upper() if text[:1].upper() in ("A", "B") else ""


_MMVP = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"\A\(?([ab])\)?\.?\s*\Z",
        r"\A\(?([ab])\)?[.\s]",
        r"answer\s+is\s+\(?([ab])",
        r"option\s+\(?([ab])",
        r"([ab])\)?(?:\s|\Z)",
    )
)


def blink(reply: str, options: Sequence[str]) -> str:
    """lmms-eval, tasks/blink: the first of these that is found; only the options' letters count.

    A first line of at most four characters that is a letter, in parentheses or not, before punctuation; the last letter
    after "answer", of either case; the last capital in parentheses; the letter that the reply begins with, of either
    case, after blanks and opening parentheses, as part of a word too.
    """
    text = reply.strip()
    valid = f"[{_UPPER[: len(options)]}{_UPPER[: len(options)].lower()}]"
    line = text.split("\n", 1)[0].strip()
    if len(line) <= 4 and (found := re.fullmatch(rf"\(?({valid})\)?[.\s:,)]*", line)):
        return found[1].upper()
    after = re.findall(rf"answers?(?:\s+is)?\s*[:-]?\s*\(?({valid})(?![a-z])", text, re.IGNORECASE)
    if stated := after or re.findall(rf"\(({valid.upper()})\)", text):
        return str(stated[-1]).upper()
    start = re.match(rf"[(\s]*({valid})", text)
    return start[1].upper() if start else ""


def mme_realworld(reply: str, options: Sequence[str]) -> str:
    """lmms-eval, tasks/mme_realworld: the first capital A to E, after phrases as "The best answer is" are cut out.

    None in more than ten words is no answer. Else, in fewer, a reply that is part of "(a)", "(b)" .. is that letter:
    so an empty one is A. The authors' own script lacks two commas in its list of phrases, so that there "Best answer:
    C" is B.
    """
    text = reply.strip()
    for phrase in _PHRASES:
        text = text.replace(phrase, "")
    if found := re.search("[A-E]", text):
        return found[0]
    if len(text.split()) > 10:
        return ""
    return next((letter for letter in "ABCDE" if text.lower() in f"({letter.lower()})"), "")


_PHRASES = (
    "The best answer is",
    "The correct answer is",
    "The answer is",
    "The answer",
    "The best option is",
    "The correct option is",
    "Best answer:",
    "Best option:",
)


def exact_matching(reply: str, options: Sequence[str]) -> str:
    """VLMEvalKit, utils/matching_util.py: a letter that stands alone, else an option's text.

    The letter of an option among the words, after . ( ) [ ] , : ; ! * # { } became blanks: if only one option's letter
    stands there, and its first place is among the last five words. A letter Z without others, and refusals, are wrong.
    Else the letter after "answer is", bold or not. Else the one option whose text the reply holds, in either case,
    unless the reply is more than twice as long as all options together.
    """
    if _FAILED not in reply and (found := _stated(reply, _UPPER[: len(options)])):
        return found
    return _by_text(reply.lower(), [option.lower() for option in options])


def _stated(reply: str, letters: str) -> str:
    if any(refusal in reply for refusal in _REFUSALS):
        return "Z"
    words = reply.translate(_BLANKS).split()
    alone = [letter for letter in letters if letter in words]
    if len(alone) == 1 and words.index(alone[0]) > len(words) - 5:
        return alone[0]
    if not alone and "Z" in words:
        return "Z"
    found = _ANSWER_IS.search(reply)
    return found[1].upper() if found and found[1].upper() in letters else ""


def _by_text(reply: str, options: Sequence[str]) -> str:
    if len(reply) > 2 * sum(map(len, options)):
        return ""
    held = [letter for letter, option in zip(_UPPER, options, strict=False) if option in reply]
    return held[0] if len(held) == 1 else ""


_BLANKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_ANSWER_IS = re.compile(r"(?:correct\s+)?answer\s+is\s+\**([ABCD])\**", re.IGNORECASE)
_FAILED = "Failed to obtain answer via API"
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
