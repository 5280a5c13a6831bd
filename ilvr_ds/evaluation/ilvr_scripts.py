"""How the evaluation scripts in XD111ds/ILVR judge an answer, each as released, from their description.

eval.py at commit 5eff4f9 (January 2026) takes the first line that names an answer and compares it letter by letter.
src/evaluate_deepseed.py at commit 13a67ed takes the last `\\boxed{}`, else the last line that names an answer, without
what surrounds it; letter case does not count, and numbers compare as numbers. In both a full-width colon counts as a
colon; where no answer is named, a single yes, no, true, false, a or b in the text is the answer; yes, true and a are
the same, and so are no, false and b. eval.py reads the prompt and the end-of-turn token along with the response: here
both judge the response alone.
"""

from __future__ import annotations

import re

JANUARY = "ILVR eval.py 5eff4f9"
LATER = "ILVR evaluate_deepseed.py 13a67ed"

_FIRST_NAMED = [re.compile(rf"{name}\s*(?:is)?\s*[:\uff1a]\s*(.+)", re.I) for name in (r"final\s*answer", "answer")]
_LAST_NAMED = [
    re.compile(r"final\s*answer\s*(?:is)?\s*[:\uff1a]?\s*(.+)", re.I),
    re.compile(r"answer\s*(?:is)?\s*[:\uff1a]\s*(.+)", re.I),
]
_BOX = re.compile(r"\\boxed\{([^{}]*)\}")
_MARKERS = re.compile(
    r"<\|(?:im_end|endoftext|eot_id|end|latent_start|latent_end|latent_pad)\|>|</?s>|\[/?INST\]"
)  # fmt: skip
_BEFORE = re.compile(r"""^[\s*_`'"“‘(\[{【]+""")
_BEHIND = re.compile(r"""[\s*_`'"”’)\]}】.。,\uff0c!\uff01?\uff1f;\uff1b:\uff1a]+$""")
_YES, _NO = ("yes", "true", "a"), ("no", "false", "b")


def january_answer(response: str) -> str:
    """What eval.py takes for the answer."""
    text = response.strip()
    for named in _FIRST_NAMED:
        if found := named.search(text):
            return re.split(r"[\n\r]", found[1].strip())[0]
    return _lone_word(text) or text


def january_is_right(response: str, answer: str) -> bool:
    """Whether eval.py finds the answer right."""
    given, known = (text.strip() for text in (january_answer(response), answer))
    return (_folded(given) or given) == (_folded(known) or known)


def later_answer(response: str) -> str:
    """What evaluate_deepseed.py takes for the answer."""
    text = _MARKERS.sub("", response).strip()
    if boxes := _BOX.findall(text):
        return _bare(boxes[-1])
    for named in _LAST_NAMED:
        if (found := named.findall(text)) and (bare := _bare(found[-1])):
            return bare
    return _lone_word(text) or _bare(text)


def later_is_right(response: str, answer: str) -> bool:
    """Whether evaluate_deepseed.py finds the answer right."""
    return _normal(later_answer(response)) == _normal(answer)


def _lone_word(text: str) -> str:
    """The one word among yes, no, true, false, a, b that the text holds; "" where there are none or several."""
    words = [word for word in re.findall(r"[a-z]+", text.lower()) if word in (*_YES, *_NO)]
    return words[0] if len(words) == 1 else ""


def _folded(text: str) -> str:
    word = text.lower()
    return "Yes" if word in _YES else "No" if word in _NO else ""


def _bare(text: str) -> str:
    """The first line without marks, quotes and brackets around it."""
    line = _MARKERS.sub("", re.split(r"[\n\r]", text.strip())[0]).strip()
    return _BEHIND.sub("", _BEFORE.sub("", line)).strip()


def _normal(text: str) -> str:
    bare = _bare(text)
    if folded := _folded(bare):
        return folded
    try:
        number = float(bare.replace(",", ""))
        return str(int(number) if number == int(number) else number)
    except (ValueError, OverflowError):  # not a number, or infinite
        return bare.lower()
