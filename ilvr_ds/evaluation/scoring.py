"""Right or wrong: rule sets that read an answer out of a response and compare it with the known one.

Rules see the response alone, never the prompt, so that nothing which only the prompt says can count. A figure under a
name of RULES can be told from every other: a verdict that changes gets another version, and results say both.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ilvr_ds.data.answer_place import last_boxed
from ilvr_ds.evaluation import comt_judge, ilvr_scripts

Options = Sequence[str]
"""Texts of a question's options; the first is A. Empty where the question lists none."""

LETTERS = "ABCDEFGHIJ"
_OPTION = re.compile(r"(?:(?<=\s)|^|(?<=[(\[]))([A-J])\s?[).:\]]\s*", re.MULTILINE)
_YES, _NO = {"yes", "true", "a"}, {"no", "false", "b"}
_MARKDOWN = re.compile(r"(?<!\w)\*+|\*+(?!\w)|`+|__|~~|^#+\s*|\\(?:text|mathrm|mathbf|textbf)\b|\$|\\[()\[\]]")
_LATIN = "A-Za-zÀ-ɏ"
_BARE_FRACTION = re.compile(r"(?<!\S)\.(?=\d)")
_EDGES = " \t\n.,;:!?\"'“”‘’(){}[]<>\uff1a\u3002"
_FINAL_ANSWER = re.compile(r"final\s+answer(?:\s+is)?\s*[:\uff1a]?\s*([^\n]*)", re.IGNORECASE)
_ANSWER = re.compile(r"\banswer(?:\s+is)?\s*[:\uff1a]\s*([^\n]*)", re.IGNORECASE)


def read_options(question: str) -> list[str]:
    """The texts of the options that a question lists as A) ... B) ..., (A) ..., A. ... or A: ...; else [].

    The letters must follow each other from A; of several lists the last counts. The last option ends with its line,
    unless another one has several: "Answer with a letter." may stand below.
    """
    found: list[tuple[int, int]] = []
    best: list[tuple[int, int]] = []
    for match in _OPTION.finditer(question):
        if match[1] == "A":
            found = []
        if match[1] == LETTERS[min(len(found), len(LETTERS) - 1)]:
            found.append(match.span())
        if len(found) >= 2:
            best = found
    ends = [start for start, _ in best[1:]] + [len(question)] * bool(best)
    texts = [question[start:end].split("\n\n")[0] for (_, start), end in zip(best, ends, strict=True)]
    texts = [text.strip(" \t\n,;([") for text in texts]
    if texts and not any("\n" in text for text in texts[:-1]):
        texts[-1] = texts[-1].partition("\n")[0].rstrip(" \t,;([")
    return texts


def extract_answer(response: str) -> str:
    r"""The last `\boxed{}`, else what follows the last "final answer (is)", else the last "answer (is):", else all."""
    if (boxed := last_boxed(response)) is not None:
        return boxed
    for pattern in (_FINAL_ANSWER, _ANSWER):
        if found := pattern.findall(_MARKDOWN.sub("", response)):
            return str(found[-1])
    return response


def option_letter(response: str, options: Options) -> str | None:
    """The option that a response means, by our own rules: the last letter in parentheses, else the letter of the last
    option text, in whole words, else the last bare letter, else the announced answer, if it is a letter of either case;
    None where there is none of them."""
    letters = LETTERS[: len(options)] or LETTERS
    if found := re.findall(rf"\(\s*([{letters}])\s*\)", response):
        return str(found[-1])
    end, _, index = max(
        ((_last_end(response, text), len(text), i) for i, text in enumerate(options)), default=(0, 0, 0)
    )
    if end > 0:
        return LETTERS[index]
    found = re.findall(rf"(?<![{_LATIN}])([{letters}])(?![{_LATIN}'’])", _composed(response))
    return str(found[-1]) if found else answer_letter(extract_answer(response), options)


def clean(text: str) -> str:
    """Without markdown, TeX wrappers, and punctuation at the ends; runs of blanks as one; .5 as 0.5.

    What is nothing else is kept: < may be an answer. Accents come as in NFC, as the models' tokenizers write them.
    """
    text = _composed(text)
    plain = " ".join(_MARKDOWN.sub("", text).split())
    return _BARE_FRACTION.sub("0.", plain).strip(_EDGES) or " ".join(text.split())


def ilvr_2026_08(response: str, answer: str, options: Options) -> bool:
    """ILVR's rules in our reading of August 2026: extract, clean, fold yes/true/a and no/false/b, compare numbers.

    It reads more than the authors' scripts do (nested boxes, TeX, units), but no lone yes or no in a sentence.
    """
    given, known = clean(extract_answer(response)).casefold(), clean(answer).casefold()
    if not given:
        return False
    for same in (_YES, _NO):
        if known in same:
            return given in same
    numbers = _number(given), _number(known)
    if numbers[0] is not None and numbers[1] is not None:
        return math.isclose(numbers[0], numbers[1], rel_tol=1e-9, abs_tol=1e-12)
    return given == known


def comt_official(response: str, answer: str, options: Options) -> bool:
    """CoMT's own judge (comt_judge.py). An answer that is an option's text stands for its letter."""
    known = answer_letter(answer, options)
    return known is not None and comt_judge.chosen_letter(response, options) == known


def is_option_letter(response: str, answer: str, options: Options) -> bool:
    """The option that a response means is the right one. Without options the text of the answer itself is looked for.

    This was called `comt-official` once.
    """
    known = answer_letter(answer, options)
    if known is None and not options and not re.search(rf"\(\s*[{LETTERS}]\s*\)", response):
        return _last_end(response, answer) > 0
    given = option_letter(response, options)
    return given is not None and given == known


def exact_match(response: str, answer: str, options: Options) -> bool:
    """The extracted answer equals the known one, blanks, markdown and surrounding punctuation aside."""
    return bool(clean(answer)) and clean(extract_answer(response)) == clean(answer)


@dataclass(frozen=True)
class RuleSet:
    """One way to judge a response; called with response, known answer and options, it says whether that is right."""

    name: str
    version: str
    """Another one for every change of a verdict. Rules that follow a published judge name it, with its commit."""
    is_right: Callable[[str, str, Options], bool]
    read: Callable[[str, Options], str | None]
    """What is taken for the answer, from response and options; None or "" where nothing is."""

    def __call__(self, response: str, answer: str, options: Options) -> bool:
        """The verdict."""
        return self.is_right(response, answer, options)


_RULE_SETS = (
    RuleSet("comt-official", f"2 ({comt_judge.VERSION})", comt_official, comt_judge.chosen_letter),
    RuleSet("option-letter", "2", is_option_letter, option_letter),
    RuleSet("ilvr-2026-08", "2", ilvr_2026_08, lambda response, options: clean(extract_answer(response))),
    RuleSet(
        "ilvr-script-5eff4f9", f"1 ({ilvr_scripts.JANUARY})",
        lambda response, answer, options: ilvr_scripts.january_is_right(response, answer),
        lambda response, options: ilvr_scripts.january_answer(response),
    ),
    RuleSet(
        "ilvr-script-13a67ed", f"1 ({ilvr_scripts.LATER})",
        lambda response, answer, options: ilvr_scripts.later_is_right(response, answer),
        lambda response, options: ilvr_scripts.later_answer(response),
    ),
    RuleSet("exact-match", "2", exact_match, lambda response, options: clean(extract_answer(response))),
)  # fmt: skip
RULES = {rules.name: rules for rules in _RULE_SETS}


@dataclass(frozen=True)
class TypeScore:
    """Accuracy of one type of task; `chance` is that of guessing among the options, None where they are unknown."""

    samples: int
    right: int
    chance: float | None

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return self.right / self.samples


def score_by_type(verdicts: Sequence[bool], types: Sequence[str], options: Sequence[int]) -> dict[str, TypeScore]:
    """Scores of each type, by name; `options` is the number of options of each sample, 0 where unknown."""
    scores = {}
    for name in sorted(set(types)):
        mine = [(v, n) for v, t, n in zip(verdicts, types, options, strict=True) if t == name]
        counts = [n for _, n in mine]
        chance = sum(1 / n for n in counts) / len(counts) if all(counts) else None
        scores[name] = TypeScore(len(mine), sum(v for v, _ in mine), chance)
    return scores


def macro_mean(scores: dict[str, TypeScore]) -> float:
    """Mean of the types' accuracies: each type counts the same."""
    return sum(score.accuracy for score in scores.values()) / len(scores)


def answer_letter(answer: str, options: Options) -> str | None:
    """The letter that an answer is or stands for."""
    text = clean(answer)
    if len(text) == 1 and text.upper() in (LETTERS[: len(options)] or LETTERS):
        return text.upper()
    if found := re.match(rf"\(?([{LETTERS}])[).:]\s", answer.strip() + " "):
        return found[1]
    same = [LETTERS[i] for i, option in enumerate(options) if clean(option).casefold() == text.casefold()]
    return same[0] if same else None


def _last_end(response: str, text: str) -> int:
    """Where `text` last ends in the response as whole words, in either case; 0 if it does not stand there.

    Ends are compared, and then lengths, so that "blue" inside "light blue" does not count.
    """
    if not text:
        return 0
    pattern = rf"(?<![{_LATIN}0-9]){re.escape(_composed(text))}(?![{_LATIN}0-9])"
    return max((match.end() for match in re.finditer(pattern, _composed(response), re.IGNORECASE)), default=0)


def _composed(text: str) -> str:
    """An accent is one letter with its base: a record from a Mac may write both apart."""
    return unicodedata.normalize("NFC", text)


def _number(text: str) -> float | None:
    bare = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text).rstrip("°%")
    return float(bare) if re.fullmatch(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?", bare) else None
