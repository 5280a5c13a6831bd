"""CoMT's own judge: the option that a reply is taken to choose.

The rules of evaluate.py in czhhzc/CoMT at commit 0109566 (March 2025), from their description. The first that finds
something decides:

1. Where the reply holds "[Answer]", only what follows its last "ANSWER:" is read.
2. The last single letter in parentheses, of either case, made upper case: whatever letter it is.
3. The last listed option whose text occurs anywhere in the reply, in either case, inside words and numbers too.
4. With newline and . , ! ? as blanks: the last in the alphabet of A, B, C, D that stand alone between blanks.
5. The same of a, b, c, d.

They misread a good deal ("D because B and A fail" is D, "**B**" is nothing): that is what published figures are of.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

VERSION = "CoMT evaluate.py 0109566"
LETTERS = "ABCD"
"""CoMT's questions have four options; of a question with fewer, their letters."""


def chosen_letter(reply: str, options: Sequence[str]) -> str | None:
    """The letter that the reply is taken to choose, not always one of LETTERS; None where no rule finds any.

    options: texts in the listed order, at most four; empty where they are not known, which leaves rule 3 out.
    """
    text = reply.rpartition("ANSWER:")[2] if "[Answer]" in reply else reply
    if in_parentheses := re.findall(r"\(([A-Za-z])\)", text):
        return str(in_parentheses[-1]).upper()
    named = [letter for letter, option in zip(LETTERS, options, strict=False) if option.lower() in text.lower()]
    if named:
        return named[-1]
    pieces = set(re.sub(r"[\n.,!?]", " ", text).split(" "))
    letters = LETTERS[: len(options)] or LETTERS
    for alphabet in (letters, letters.lower()):
        if alone := [letter for letter in alphabet if letter in pieces]:
            return alone[-1].upper()
    return None
