"""The body of a request for a chat completion: what OpenAI's clients send, checked key by key.

A key that would change the answer and that this server does not know is refused: nothing is ignored quietly but what
is about the account of whoever asks.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ilvr_ds.errors import nearest
from ilvr_ds.generation.settings import GenerationSettings
from ilvr_ds.serving.limits import Limits
from ilvr_ds.serving.refusal import RefusedError

_ABOUT_THE_ACCOUNT = {"user", "metadata", "store", "safety_identifier", "prompt_cache_key", "service_tier"}
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logprobs": (False,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
"""Keys of OpenAI's that are known here by the values alone that change nothing."""


class StreamOptions(BaseModel):
    """Of a request that streams."""

    model_config = ConfigDict(strict=True)
    include_usage: bool = False


class ChatRequest(BaseModel):
    """A request; `model_extra` holds the keys that it has besides."""

    model_config = ConfigDict(strict=True, extra="allow")
    model: str
    messages: list[dict[str, Any]] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=0)
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts after which the answer ends."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


def read_request(body: bytes) -> ChatRequest:
    """Raises RefusedError."""
    try:
        request = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise RefusedError(400, f"{key or 'the body'}: {first['msg']}", key or None) from error
    for key, value in (request.model_extra or {}).items():
        if value is None or key in _ABOUT_THE_ACCOUNT:
            continue
        if key not in _NEUTRAL:
            hint = nearest(key, (*ChatRequest.model_fields, *_NEUTRAL))
            raise RefusedError(400, f"{key}: is unknown{hint}", key, "unknown_parameter")
        if value not in _NEUTRAL[key]:
            raise RefusedError(400, f"{key}: is not supported here; leave it out", key, "unsupported_parameter")
    if "" in request.stops:
        raise RefusedError(400, "stop: holds an empty text", "stop")
    return request


def generation_of(request: ChatRequest, limits: Limits) -> GenerationSettings:
    """How a request is to be answered; what it does not say is the server's. Raises RefusedError."""
    asked: dict[str, Any] = {
        "max_new_tokens": request.max_completion_tokens or request.max_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "seed": request.seed,
        "stop": request.stops or None,
    }
    settings = replace(limits.generation, **{key: value for key, value in asked.items() if value is not None})
    if settings.max_new_tokens > (most := limits.generation.max_new_tokens):
        message = f"max_tokens: {settings.max_new_tokens}, the server's --max-new-tokens allows {most}"
        raise RefusedError(400, message, "max_tokens")
    return settings
