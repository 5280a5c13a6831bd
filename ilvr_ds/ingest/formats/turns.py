"""Turns of a conversation in the two spellings of the field, LLaVA's and ShareGPT's `from` and `value`, and the chat
templates' `role` and `content`; their images."""

from __future__ import annotations

import json
import re
from typing import Any, get_args

from ilvr_ds.data.sample import IMAGE_MARKER, Role, SampleError, Turn
from ilvr_ds.ingest.picture import Picture, read_picture
from ilvr_ds.ingest.record import Record, items, kind, pictures, text

_ROLES: dict[str, Role] = {"human": "user", "gpt": "assistant", **{role: role for role in get_args(Role)}}
_LINE_BREAKS = re.compile(rf"\n?{re.escape(IMAGE_MARKER)}\n?")
_IMAGE_TYPES = ("image", "image_url")
_IMAGE_KEYS = (*_IMAGE_TYPES, "path")
_FILM_KEYS = ("video", "videos", "audio", "audios")
_CALL_KEYS = ("tool_calls", "function_call")
THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Of an assistant's turn: what it thought before its text."""
_LEARNING_KEYS = ("weight", "loss", "train")
"""Of an assistant's turn in data for other trainers: 0 or false says not to learn from it."""


def read_turns(record: Record) -> tuple[list[Turn], list[Picture]]:
    """The turns of `conversations` or `messages`, and the images that stand in them.

    A prompt `system` beside them is the first turn. A user's image is at `<image>`; a line break beside it is left out,
    as published loaders do. Images come from `image` or `images`, or from parts of the messages. Raises SampleError for
    a role that is none of the three, and for a record about a film or a sound.
    """
    key = "conversations" if record.get("conversations") is not None else "messages"
    inside: list[Picture] = []
    turns = [_turn({"role": "system", "content": record["system"]}, inside)] if record.get("system") else []
    for number, turn in enumerate(items(record, key), start=1):
        try:
            turns.append(_turn(turn, inside))
        except SampleError as error:
            raise SampleError(f"turn {number}: {error}") from error
    if film := next((key for key in _FILM_KEYS if record.get(key)), None):
        raise SampleError(f"the record has '{film}', and only images are read; leave it out")
    if record.get("image") and record.get("images"):
        raise SampleError("images stand both in 'image' and in 'images'")
    beside = pictures(record, "image", "images")
    if inside and beside:
        raise SampleError("images stand both in the messages and in 'image' or 'images'")
    return turns, inside or beside


def last_question(turns: list[Turn]) -> tuple[tuple[Turn, ...], str, str]:
    """The turns before the last question, the question, and the reply to it ("" where a lone question has none)."""
    opening = next((n for n, turn in enumerate(turns) if turn.role != "system"), len(turns))
    asked = [turn.role for turn in turns[opening:]]
    if not asked or asked[0] != "user":
        raise SampleError("the conversation does not begin with the user")
    if asked == ["user"]:
        return tuple(turns[:-1]), turns[-1].text, ""
    if asked[-1] != "assistant":
        raise SampleError("the conversation ends with the user: nobody replies")
    return tuple(turns[:-2]), turns[-2].text, turns[-1].text


def _turn(turn: Any, inside: list[Picture]) -> Turn:
    if not isinstance(turn, dict):
        raise SampleError(f"it is {kind(turn)}, expected an object")
    role_key, text_key = ("from", "value") if "from" in turn else ("role", "content")
    named = text(turn, role_key)
    if named not in _ROLES:
        raise SampleError(f"its role '{named}' is none of {', '.join(_ROLES)}")
    role = _ROLES[named]
    if call := next((key for key in _CALL_KEYS if turn.get(key)), None):
        raise SampleError(f"it has '{call}', and calls of tools are not read")
    if role == "assistant":
        _check_learned(turn)
    content = turn.get(text_key)
    words = _words(content, inside) if isinstance(content, list) else text(turn, text_key)
    if role != "user" and IMAGE_MARKER in words:
        raise SampleError(f"an image in a turn of the {role}; a helper image needs a format with a plan")
    return Turn(role, _LINE_BREAKS.sub(IMAGE_MARKER, words) if role == "user" else words)


def _check_learned(turn: Record) -> None:
    """Raise SampleError where not all of an assistant's turn would be learned from, or more than it says."""
    if thought := next((key for key in THOUGHT_KEYS if turn.get(key)), None):
        raise SampleError(f"it has '{thought}' beside its text, and only the text is learned from; put it there")
    if off := next((key for key in _LEARNING_KEYS if turn.get(key, True) in (0, False)), None):
        raise SampleError(f"it has '{off}' {json.dumps(turn[off])}, but every turn of the assistant is learned from")


def _words(parts: list[Any], inside: list[Picture]) -> str:
    """The text of a message of parts; its images, where the parts hold them, are added to `inside`."""
    words = ""
    for part in parts:
        if not isinstance(part, dict) or part.get("type") not in ("text", *_IMAGE_TYPES):
            raise SampleError("a part of its 'content' is neither text nor an image")
        if part["type"] == "text":
            words += text(part, "text")
        else:
            words += IMAGE_MARKER
            value = next((part[key] for key in _IMAGE_KEYS if part.get(key) is not None), None)
            value = value.get("url", value) if isinstance(value, dict) else value
            inside += [] if value is None else [_part_image(value)]
    if not words.strip():
        raise SampleError("its 'content' is empty")
    return words


def _part_image(value: Any) -> Picture:
    if found := read_picture(value):
        return found
    raise SampleError(f"an image of its 'content' is {kind(value)}, expected a path")
