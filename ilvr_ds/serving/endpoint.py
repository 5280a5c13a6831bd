"""The HTTP side: routes, the token, bodies within limits, answers whole or as server-sent events.

The event loop only moves bytes: requests are read in threads, prompts are made in one thread (the tokenizer has one
user), and a third decodes (batches.py).
"""

from __future__ import annotations

import asyncio
import secrets
import time
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from ilvr_ds.data.sample import SampleError
from ilvr_ds.data.template import EncodedSample
from ilvr_ds.errors import nearest
from ilvr_ds.generation.answers import Answer
from ilvr_ds.generation.loading import Reasoner
from ilvr_ds.serving.batches import Batches, Job
from ilvr_ds.serving.limits import Limits
from ilvr_ds.serving.messages import fetch_images, sample_of
from ilvr_ds.serving.refusal import RefusedError
from ilvr_ds.serving.replies import Replies, event
from ilvr_ds.serving.request import ChatRequest, generation_of, read_request

LOOK_S = 1.0
"""Seconds between two looks whether a client that waits is still there."""


@dataclass(frozen=True)
class Access:
    """Who may ask."""

    token: str | None = None
    """What stands behind `Bearer`; None: anybody who reaches the port."""
    hosts: tuple[str, ...] = ("*",)
    """Names by which the server may be addressed. On loopback only its own: a web page whose name was made to lead
    here (DNS rebinding) is refused."""
    origins: tuple[str, ...] = ()
    """Web pages that may read answers (CORS)."""


class Endpoint:
    """One model under /v1, and /health."""

    def __init__(self, reasoner: Reasoner, name: str, limits: Limits, access: Access) -> None:
        self.reasoner = reasoner
        self.name = name
        self.limits = limits
        self.access = access
        self.batches = Batches(reasoner, limits.batch_size, limits.waiting)
        self._started = int(time.time())
        self._preparing = ThreadPoolExecutor(1, "prompts")

    def app(self) -> FastAPI:
        """The application; its queue runs while it does."""
        app = FastAPI(lifespan=self._lifespan, docs_url=None, redoc_url=None, openapi_url=None)
        known = [Depends(self._check_token)]
        app.add_api_route("/health", self.health, response_model=None)
        app.add_api_route("/v1/models", self.models, dependencies=known)
        app.add_api_route("/v1/models/{name:path}", self.model, dependencies=known)
        app.add_api_route("/v1/chat/completions", self.chat, methods=["POST"], dependencies=known, response_model=None)
        app.add_exception_handler(RefusedError, _refuse)
        app.add_exception_handler(HTTPException, _refuse)
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(self.access.hosts), www_redirect=False)
        if self.access.origins:
            origins = list(self.access.origins)
            app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])
        return app

    async def health(self) -> Response:
        """Whether it answers, and how much it has done."""
        status = "ok" if self.batches.is_alive else "stopped"
        counts = {"waiting": self.batches.waiting, **asdict(self.batches.counts)}
        return JSONResponse({"status": status, **counts}, 200 if self.batches.is_alive else 503)

    async def models(self) -> dict[str, Any]:
        """The list of one."""
        return {"object": "list", "data": [self._card()]}

    async def model(self, name: str) -> dict[str, Any]:
        """The one."""
        self._check_name(name)
        return self._card()

    async def chat(self, request: Request) -> Response:
        """An answer to the last message, with those before it as its history."""
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            raise RefusedError(415, "the body must be application/json")
        body = await _body(request, self.limits.body_bytes)
        asked = await run_in_threadpool(read_request, body)
        self._check_name(asked.model)
        settings = generation_of(asked, self.limits)
        await run_in_threadpool(fetch_images, asked.messages, self.limits)
        identity = f"chatcmpl-{uuid.uuid4().hex}"
        # what is drawn depends on seed and name: a seed that is asked for gives the same answer again
        name = identity if asked.seed is None else "question"
        prompt = await asyncio.get_running_loop().run_in_executor(self._preparing, self._prompt, asked, name)
        replies = Replies(identity, self.name, int(time.time()), prompt)
        job = Job(prompt, settings)
        if not asked.stream:
            return JSONResponse(replies.whole(await self._wait(job, request)))
        pieces = self._submit_streaming(job)
        with_usage = asked.stream_options is not None and asked.stream_options.include_usage
        return StreamingResponse(_events(job, pieces, replies, with_usage), media_type="text/event-stream")

    def _prompt(self, asked: ChatRequest, name: str) -> EncodedSample:
        sample = sample_of(asked.messages, name, self.limits)
        try:
            return self.reasoner.encoder.prompt(sample)
        except SampleError as error:
            raise RefusedError(400, str(error), "messages") from error

    async def _wait(self, job: Job, request: Request) -> Answer:
        """The answer; where the client goes away first, nobody computes it any more."""
        self.batches.submit(job)
        answer = asyncio.wrap_future(job.answer)
        try:
            while not (await asyncio.wait({answer}, timeout=LOOK_S))[0]:
                if await request.is_disconnected():
                    raise RefusedError(499, "the client has gone")
            return answer.result()
        finally:
            job.is_abandoned = True
            answer.cancel()

    def _submit_streaming(self, job: Job) -> asyncio.Queue[str | None]:
        """The pieces of an answer as they are decoded; None behind the last."""
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[str | None] = asyncio.Queue()
        job.on_text = lambda piece: _tell(loop, pieces, piece)
        job.answer.add_done_callback(lambda done: _tell(loop, pieces, None))
        self.batches.submit(job)
        return pieces

    async def _check_token(self, request: Request) -> None:
        given = request.headers.get("authorization", "")
        if self.access.token is not None and not secrets.compare_digest(
            given.encode(), f"Bearer {self.access.token}".encode()
        ):
            raise RefusedError(401, "the token is missing or wrong", None, "invalid_api_key")

    def _check_name(self, name: str) -> None:
        if name != self.name:
            raise RefusedError(
                404, f"the model '{name[:80]}' does not exist{nearest(name, [self.name])}", "model", "model_not_found"
            )

    def _card(self) -> dict[str, Any]:
        return {"id": self.name, "object": "model", "created": self._started, "owned_by": "ilvr_ds"}

    @asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        self.batches.start()
        yield
        await run_in_threadpool(self.batches.close)
        self._preparing.shutdown(wait=False)


async def _events(
    job: Job, pieces: asyncio.Queue[str | None], replies: Replies, with_usage: bool
) -> AsyncIterator[bytes]:
    """The answer as it is decoded, then why it ended. Ended early by a client that goes away."""
    sent = 0
    try:
        yield event(replies.piece({"role": "assistant", "content": ""}))
        while (piece := await pieces.get()) is not None:
            sent += len(piece)
            yield event(replies.piece({"content": piece}))
        answer = job.answer.result()
        if rest := answer.text[sent:]:  # a letter that never became whole
            yield event(replies.piece({"content": rest}))
        yield event(replies.piece({}, answer))
        if with_usage:
            yield event(replies.usage_piece(answer))
        yield event("[DONE]")
    except RefusedError as refusal:
        yield event(refusal.body())
    finally:
        job.is_abandoned = True
        job.answer.cancel()


def _tell(loop: asyncio.AbstractEventLoop, pieces: asyncio.Queue[str | None], piece: str | None) -> None:
    """From another thread; a server that has stopped hears nothing."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(pieces.put_nowait, piece)


async def _body(request: Request, most: int) -> bytes:
    """Raises RefusedError as soon as it is too large."""
    length = request.headers.get("content-length", "")
    announced, size = int(length) if length.isdecimal() else 0, 0
    parts: list[bytes] = []
    async for part in request.stream():
        size += len(part)
        if max(announced, size) > most:
            raise RefusedError(413, f"a body of more than {most} bytes; send fewer or smaller images")
        parts.append(part)
    return b"".join(parts)


async def _refuse(request: Request, error: Exception) -> Response:
    """Errors of ours and of the router (a path or method that there is not) in OpenAI's form."""
    if isinstance(error, HTTPException):
        error = RefusedError(error.status_code, f"{request.method} {request.url.path[:80]}: {error.detail}")
    assert isinstance(error, RefusedError)
    return JSONResponse(error.body(), error.status)
