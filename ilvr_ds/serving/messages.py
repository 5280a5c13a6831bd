"""The messages of a chat, with their images, as a sample."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import requests

from ilvr_ds.data.check import check_sample
from ilvr_ds.data.decode import image_size
from ilvr_ds.data.sample import Sample, SampleError
from ilvr_ds.errors import first_line
from ilvr_ds.ingest.formats.turns import THOUGHT_KEYS, read_turns
from ilvr_ds.serving.limits import Limits
from ilvr_ds.serving.refusal import RefusedError

FETCH_S = 20.0
"""Longest time to fetch an image."""


def fetch_images(messages: list[dict[str, Any]], limits: Limits) -> None:
    """Put the bytes of images in the place of their addresses.

    Raises RefusedError for an address of a host that is not allowed, and for what cannot be fetched.
    """
    parts = list(_image_parts(messages))
    if len(parts) > limits.images:
        raise _refused(f"{len(parts)} images, {limits.images} are allowed")
    for part in parts:
        held = part.get("image_url")
        url = held.get("url") if isinstance(held, dict) else held
        if isinstance(url, str) and url[:8].lower().startswith(("http://", "https://")):
            part["image_url"] = _fetch(url, limits)
        elif not (isinstance(url, str) and url[:5].lower() == "data:"):
            raise _refused("an image is no data: URL; send data:image/png;base64,...")


def sample_of(messages: list[dict[str, Any]], name: str, limits: Limits) -> Sample:
    """The last message as the question, the others as its history; images have been fetched. Raises RefusedError."""
    try:
        turns, pictures = read_turns({"messages": [_as_read(message) for message in messages]})
        images = tuple(picture.data for picture in pictures if picture.data is not None)
        if len(images) != len(pictures):
            raise SampleError("an image is no data: URL of a picture; send data:image/png;base64,...")
        if turns[-1].role != "user":
            raise SampleError("the last message is not the user's")
        for data in images:
            if len(data) > limits.image_bytes:
                raise SampleError(f"an image of {len(data)} bytes, {limits.image_bytes} are allowed")
            image_size(data, limits.image_pixels)
        sample = Sample(name, turns[-1].text, (), images, history=tuple(turns[:-1]))
        check_sample(sample)
    except SampleError as error:
        raise _refused(str(error)) from error
    return sample


def _as_read(message: dict[str, Any]) -> dict[str, Any]:
    """OpenAI's newer name for the system is `developer`. Clients may send back what a reply thought, which chat
    templates leave out too."""
    kept = {key: value for key, value in message.items() if key not in THOUGHT_KEYS}
    return kept | {"role": "system"} if message.get("role") == "developer" else kept


def _image_parts(messages: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for message in messages:
        parts = message.get("content")
        for part in parts if isinstance(parts, list) else ():
            if isinstance(part, dict) and part.get("type") != "text":
                if part.get("type") != "image_url":
                    raise _refused(f"a part of type {part.get('type')!r:.40}; text and image_url are answered")
                yield part


def _fetch(url: str, limits: Limits) -> bytes:
    """The bytes behind an address; redirections are not followed, as they may lead to any host."""
    host = urlsplit(url).hostname or ""
    if host not in limits.url_hosts:
        raise _refused(
            f"images are not fetched from '{host[:80]}'; send a data: URL (or the server is started with "
            "--allow-url-images HOST)"
        )
    data, end = b"", time.monotonic() + FETCH_S
    try:
        with requests.get(url, stream=True, timeout=FETCH_S / 2, allow_redirects=False) as response:
            if response.status_code != requests.codes.ok:
                raise _refused(f"{url[:200]}: answered with status {response.status_code}")
            for piece in response.iter_content(65536):
                data += piece
                if len(data) > limits.image_bytes:
                    raise _refused(f"{url[:200]}: more than the {limits.image_bytes} bytes that are allowed")
                if time.monotonic() > end:
                    raise _refused(f"{url[:200]}: took longer than {FETCH_S:.0f} s")
    except requests.RequestException as error:
        raise _refused(f"{url[:200]}: cannot be fetched ({first_line(error)[:200]})") from error
    return data


def _refused(message: str) -> RefusedError:
    return RefusedError(400, message, "messages")
