r"""What formats do with their texts: plans between images, answers, and how an answer is announced."""

from __future__ import annotations

import re

from ilvr_ds.data.answer_place import last_boxed
from ilvr_ds.data.sample import LatentStep, Step, TextStep

_ANSWER_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)


def plan_of(pieces: list[str]) -> list[Step]:
    """Steps of texts with a helper image between each two; blank texts at the ends are no steps.

    Helper images are numbered in their order.
    """
    steps: list[Step] = [TextStep(pieces[0])] if pieces[0] else []
    for helper, piece in enumerate(pieces[1:]):
        steps += [LatentStep(helper), TextStep(piece)] if piece else [LatentStep(helper)]
    return steps


def boxed(output: str) -> str:
    r"""The content of the last whole `\boxed{...}`; "" without one."""
    return (last_boxed(output) or "").strip()


def stated_answer(reply: str) -> str:
    r"""The content of the last `<answer>...</answer>`, else of the last `\boxed{...}`; "" without one."""
    tags = _ANSWER_TAG.findall(reply)
    return tags[-1].strip() if tags else boxed(reply)


def announced(answer: str) -> str:
    """The sentence that ends the plans of formats that keep the answer apart, as in the authors' own data."""
    return f"The final answer is: {answer}"
