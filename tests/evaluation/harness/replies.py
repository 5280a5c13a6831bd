"""Replies to multiple-choice questions of every kind that rules tell apart, drawn at random."""

from __future__ import annotations

import random

OPTIONS = {"A": "red", "B": "light blue", "C": "blue", "D": "a cat"}
_PIECES = [
    "A", "B", "c", "D", "E", "Z", "(A)", "(b)", "C)", "d.", "B]", "**C**", "answer", "Answer:", "The answer is",
    "the correct answer is", "The best answer is", "Best answer:", "option", "Option is", "choice", "red", "blue",
    "light blue", "A cat", "sits", "After", "Because", "Grab", "it is", "I see", ":", ".", ",", "\n", "\n\n", "#", "1",
    "none of them at all, as far as I can see in this picture", "Cannot determine the answer", "é", "\u3000", "((",
    "answer is B", "Failed to obtain answer via API",
]  # fmt: skip


def draw_replies(count: int) -> list[str]:
    """`count` replies, from empty ones to some of ten pieces."""
    draw = random.Random(0)
    joined = ("", " ", " ", " ")
    return [
        "".join(
            piece + draw.choice(joined) for piece in draw.choices(_PIECES, k=draw.choice((0, 1, 1, 2, 3, 4, 6, 10)))
        )
        for _ in range(count)
    ]
