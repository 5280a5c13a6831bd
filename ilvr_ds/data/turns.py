"""A sample's prompt as the messages that chat templates take."""

from __future__ import annotations

from typing import Any

from ilvr_ds.data.sample import IMAGE_MARKER, Sample, Turn


def prompt_turns(sample: Sample) -> list[dict[str, Any]]:
    """The messages before the assistant's last: images at the markers of the user's texts, without any before them."""
    image = {"type": "image"}
    is_marked = any(IMAGE_MARKER in text for text in sample.user_texts)
    first = [image] * (0 if is_marked else len(sample.input_images))
    turns: list[dict[str, Any]] = []
    for turn in (*sample.history, Turn("user", sample.question)):
        if turn.role == "user":
            turns.append({"role": "user", "content": [*first, *_parts(turn.text)]})
            first = []
        else:
            turns.append({"role": turn.role, "content": turn.text})
    return turns


def _parts(text: str) -> list[dict[str, str]]:
    """A user's text with an image at each marker."""
    pieces = text.split(IMAGE_MARKER)
    parts = [{"type": "text", "text": pieces[0]}] if pieces[0] or len(pieces) == 1 else []
    for piece in pieces[1:]:
        parts += [{"type": "image"}, *([{"type": "text", "text": piece}] if piece else [])]
    return parts
