"""Where a data set lies: a folder or an http(s) address, read by byte ranges.

Both kinds can be pickled and forked: each process opens its own files and connections. One storage serves one thread.
"""

from __future__ import annotations

import errno
import os
import re
import time
from abc import ABC, abstractmethod
from collections import OrderedDict
from io import FileIO
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import requests

from ilvr_ds.errors import UserError

MAX_OPEN_FILES = 64
CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 10.0, 60.0
PAUSES_S = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 60.0)
"""Between attempts to read a range from a server, which answered when the data set was opened and may do so again."""
RETRIES = 3
"""How many of the pauses a local file gets, and a whole file, which is read when a data set is opened."""
_TRANSIENT = (errno.EAGAIN, errno.EINTR, errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH)
"""Errors of a network file system while its server is away or its files are being moved."""
_RETRY_STATUS = (429, 500, 502, 503, 504)
_BROKEN_OFF = (requests.exceptions.ChunkedEncodingError, requests.exceptions.ContentDecodingError)


class _BusyError(Exception):
    """The server asks to come back later."""


class Storage(ABC):
    """The files of one data set; `label` is how messages name it."""

    label: str
    retries = 0
    """Reads that this process repeated after a transient fault."""
    sizes_are_cheap: bool
    """Whether the size of every file may be asked for."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """A whole (small) file; raises UserError where it is missing."""

    @abstractmethod
    def read_range(self, name: str, offset: int, length: int) -> bytes:
        """Exactly `length` bytes of a file from `offset` on; raises UserError where they cannot be had."""

    @abstractmethod
    def size(self, name: str) -> int:
        """Length of a file in bytes; raises UserError where it is missing."""


def open_storage(location: str) -> Storage:
    """The storage at a local path or an http(s) address; raises UserError for any other, and never runs a command."""
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):", location)
    if scheme is None or Path(location).exists():
        return LocalFolder(Path(location).absolute())
    if scheme[1].lower() in ("http", "https"):
        return HttpFolder(location)
    never = " and would run a command, which nothing here does" if scheme[1].lower() == "pipe" else ""
    raise UserError(f"{location}: '{scheme[1]}:' is not supported{never}; give a local folder or an http(s) address")


class LocalFolder(Storage):
    """A folder of this machine."""

    sizes_are_cheap = True

    def __init__(self, path: Path) -> None:
        self.path = path
        self.label = str(path)
        self._files: OrderedDict[str, FileIO] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict(), "retries": 0}

    def read(self, name: str) -> bytes:
        """A whole (small) file."""
        return self.read_range(name, 0, self.size(name))

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        """`length` bytes from `offset` on, without moving a file position that another process may share."""
        pauses = iter(PAUSES_S[:RETRIES])
        while True:
            try:
                return self._read_once(name, offset, length)
            except OSError as error:
                pause = next(pauses, None) if error.errno in _TRANSIENT else None
                if pause is None:
                    raise UserError(f"{self.path / name}: cannot be read ({error.strerror})") from error
                if name in self._files:
                    self._files.pop(name).close()  # a stale handle stays stale
                self.retries += 1
                time.sleep(pause)

    def _read_once(self, name: str, offset: int, length: int) -> bytes:
        file = self._open(name)
        parts = []
        while length and (part := os.pread(file.fileno(), length, offset)):
            parts.append(part)
            offset, length = offset + len(part), length - len(part)
        if length:
            raise UserError(
                f"{self.path / name}: ends at byte {offset}, {length} bytes too early; copy or pack it again"
            )
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def size(self, name: str) -> int:
        """Length of a file in bytes."""
        try:
            return (self.path / name).stat().st_size
        except OSError as error:
            raise UserError(f"{self.path / name}: cannot be read ({error.strerror})") from error

    def _open(self, name: str) -> FileIO:
        if name in self._files:
            self._files.move_to_end(name)
            return self._files[name]
        if len(self._files) == MAX_OPEN_FILES:
            self._files.popitem(last=False)[1].close()
        file = self._files[name] = FileIO(self.path / name)
        return file


class HttpFolder(Storage):
    """A folder of a web server that answers range requests."""

    sizes_are_cheap = False

    def __init__(self, url: str) -> None:
        self._url = urlsplit(url)
        # Neither a password nor a signature in the address may reach a log.
        host = self._url.netloc.rpartition("@")[2]
        self.label = urlunsplit((self._url.scheme, host, self._url.path.rstrip("/"), "", ""))
        self._session: requests.Session | None = None
        self._process = -1

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_session": None, "_process": -1, "retries": 0}

    def read(self, name: str) -> bytes:
        """A whole (small) file."""
        return self._get(name, None)[0]

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        """`length` bytes from `offset` on."""
        return self._get(name, (offset, length))[0] if length else b""

    def size(self, name: str) -> int:
        """Length of a file in bytes, from the answer to a request for its first byte."""
        total = re.fullmatch(r"bytes 0-0/(\d+)", self._get(name, (0, 1))[1])
        if total is None:
            raise UserError(f"{self.label}/{name}: the server does not tell the length of the file")
        return int(total[1])

    def _get(self, name: str, span: tuple[int, int] | None) -> tuple[bytes, str]:
        """Body and Content-Range of the whole file or of the span (offset, length)."""
        pauses = iter(PAUSES_S if span else PAUSES_S[:RETRIES])
        while True:
            try:
                return self._get_once(name, span)
            except (*_BROKEN_OFF, requests.ConnectionError, requests.Timeout, _BusyError) as error:
                pause = next(pauses, None)
                if pause is None:
                    # These errors repeat the address with its query, which may hold a signature.
                    what = "the answer broke off" if isinstance(error, _BROKEN_OFF) else "no answer from the server"
                    what = str(error) if isinstance(error, _BusyError) else f"{what} ({type(error).__name__})"
                    raise UserError(f"{self.label}/{name}: {what}, after several tries") from error
                self.retries += 1
                time.sleep(pause)
            except requests.RequestException as error:
                raise UserError(f"{self.label}/{name}: no answer from the server ({type(error).__name__})") from error

    def _get_once(self, name: str, span: tuple[int, int] | None) -> tuple[bytes, str]:
        where = f"{self.label}/{name}"
        url = urlunsplit(self._url._replace(path=f"{self._url.path.rstrip('/')}/{name}", fragment=""))
        headers = {"Accept-Encoding": "identity"}
        if span:
            headers["Range"] = f"bytes={span[0]}-{span[0] + span[1] - 1}"
        timeout = (CONNECT_TIMEOUT_S, READ_TIMEOUT_S)
        # Streamed: a server that sends the whole shard instead of a range is noticed before it has.
        with self._connect().get(url, headers=headers, stream=True, timeout=timeout) as answer:
            if answer.status_code == 404:
                raise UserError(f"{where}: the server has no such file (404)")
            if span and answer.status_code == 200:
                raise UserError(f"{where}: the server ignores range requests; use one that answers them (nginx, S3)")
            if span and answer.status_code == 416:
                raise UserError(f"{where}: is shorter than byte {span[0]}; copy or pack it again")
            if answer.status_code in _RETRY_STATUS:
                raise _BusyError(f"the server answers {answer.status_code} {answer.reason}")
            if answer.status_code != (206 if span else 200):
                raise UserError(f"{where}: the server answers {answer.status_code} {answer.reason}")
            content_range = answer.headers.get("Content-Range", "")
            if span and not content_range.startswith(f"{headers['Range'].replace('=', ' ')}/"):
                raise UserError(f"{where}: asked for {headers['Range']}, the server sends '{content_range}'")
            body = answer.content
        if span and len(body) != span[1]:
            raise UserError(f"{where}: asked for {span[1]} bytes at {span[0]}, the server sent {len(body)}")
        return body, content_range

    def _connect(self) -> requests.Session:
        """The session of this process: two processes must not share a connection."""
        if self._session is None or self._process != os.getpid():
            self._session = requests.Session()
            self._process = os.getpid()
        return self._session
