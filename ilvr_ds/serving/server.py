"""The process around the endpoint: what must be installed, a port of its own, an end by Ctrl-C or SIGTERM."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from ilvr_ds.addresses import is_loopback, url_of
from ilvr_ds.ctrl_c import signals_as_ctrl_c
from ilvr_ds.errors import UserError

if TYPE_CHECKING:
    from ilvr_ds.serving.endpoint import Endpoint

TOKEN_VARIABLE = "ILVR_SERVE_TOKEN"
GRACE_S = 10
"""Seconds that a request in progress has when the server is told to stop."""


def check_installed() -> None:
    """Raise UserError where a package of the extra is missing."""
    for package in ("fastapi", "uvicorn"):
        try:
            version(package)
        except PackageNotFoundError as error:
            raise UserError(f"serve: {package} is not installed; pip install '.[serve]'") from error


def read_token(file: Path | None) -> str | None:
    """The token of a file, else of the environment; None: there is none. Raises UserError.

    No option takes the token itself: everybody on a machine sees what its processes were started with.
    """
    source, text = f"the environment's {TOKEN_VARIABLE}", os.environ.get(TOKEN_VARIABLE)
    if file is not None:
        source = f"--token-file {file}"
        try:
            text = file.read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(f"{source}: cannot read it ({error.strerror})") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{source}: is no text in UTF-8") from error
    if text is None:
        return None
    token = text.strip()
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise UserError(f"{source}: expected one word of ASCII letters, digits and signs")
    return token


def check_reach(host: str, token: str | None) -> None:
    """Raise UserError where other machines could ask without a token."""
    if token is None and not is_loopback(host):
        raise UserError(
            f"--host {host}: other machines reach it; give a token by --token-file or {TOKEN_VARIABLE}, or leave it "
            "out and come by an ssh tunnel"
        )


def own_names(host: str) -> tuple[str, ...]:
    """By which names clients may address the server: any, unless it is reached from this machine alone."""
    return ("localhost", "127.0.0.1", "[::1]", "::1", host) if is_loopback(host) else ("*",)


def listen(host: str, port: int) -> socket.socket:
    """Take the port, 0 for any that is free, before a model is loaded. Raises UserError."""
    if not 0 <= port <= 65535:
        raise UserError(f"--port: {port} is not a port; give 1 to 65535, or 0 for any that is free")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        taken = socket.socket(family, kind, protocol)
    except OSError as error:
        raise UserError(f"--host {host}: is no address of this machine ({error.strerror})") from error
    try:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(address)
    except OSError as error:
        taken.close()
        raise UserError(f"--host {host} --port {port}: cannot be had ({error.strerror}); give another") from error
    return taken


def address_of(listening: socket.socket) -> str:
    """As clients write it."""
    return url_of(*listening.getsockname()[:2])


def serve(endpoint: Endpoint, listening: socket.socket, say: Callable[[str], None]) -> int:
    """Answer until Ctrl-C or SIGTERM, then return 0. Says the address once it does."""
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets=sockets)
            say(f"{endpoint.name} answers at {address_of(listening)}/v1")
            say("Ctrl-C ends the server")

    config = uvicorn.Config(
        endpoint.app(), log_config=None, access_log=False, server_header=False, timeout_graceful_shutdown=GRACE_S
    )
    try:
        with signals_as_ctrl_c():
            Server(config).run(sockets=[listening])  # raises the signal that ended it once more
    except KeyboardInterrupt:
        return 0
    raise UserError("the server ended by itself; what it said stands above")
