"""Answers in the JSON form of OpenAI's chat completions, whole and in pieces.

Latents are vectors and no text: `content` holds the words around them, `latent_steps` how many each segment had. They
count as completion tokens, and as reasoning tokens in the details.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from ilvr_ds.data.template import EncodedSample
from ilvr_ds.generation.answers import Answer


@dataclass(frozen=True)
class Replies:
    """To one request."""

    id: str
    model: str
    created: int
    """Seconds since 1970."""
    prompt: EncodedSample

    def whole(self, answer: Answer) -> dict[str, Any]:
        """A completion."""
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, **_end(answer)}
        return {**self._head("chat.completion"), "choices": [choice], "usage": self.usage(answer)}

    def piece(self, delta: dict[str, Any], answer: Answer | None = None) -> dict[str, Any]:
        """A chunk; with the answer it is the last."""
        end = _end(answer) if answer else {"finish_reason": None}
        choice = {"index": 0, "delta": delta, "logprobs": None, **end}
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def usage_piece(self, answer: Answer) -> dict[str, Any]:
        """The chunk behind the last, for a client that asked for it."""
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": self.usage(answer)}

    def usage(self, answer: Answer) -> dict[str, Any]:
        """Tokens; those of images are the prompt's."""
        prompt, completion = len(self.prompt.input_ids), len(answer.tokens)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "completion_tokens_details": {"reasoning_tokens": sum(answer.steps)},
        }

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def _end(answer: Answer) -> dict[str, Any]:
    return {"finish_reason": "length" if answer.hit_limit else "stop", "latent_steps": list(answer.steps)}


def event(data: dict[str, Any] | str) -> bytes:
    """A server-sent event."""
    text = data if isinstance(data, str) else json.dumps(data)
    return f"data: {text}\n\n".encode()
