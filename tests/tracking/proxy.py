"""A proxy in front of a tracking server, which misbehaves on demand; the server itself stays untouched."""

from __future__ import annotations

import http.client
import http.server
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Door:
    """`mode`: "open", "500", "hang", or "mute" (the server does what it is asked, and the answer gets lost)."""

    def __init__(self, port: int) -> None:
        self.mode = "open"
        self.requests = 0
        door = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                door.requests += 1
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if door.mode == "hang":
                    time.sleep(7)  # longer than the client waits
                    return
                if door.mode == "500":
                    self.send_error(500)
                    return
                back = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
                headers = {k: v for k, v in self.headers.items() if k.lower() != "host"}
                try:
                    back.request(self.command, self.path, body, headers)
                    answer = back.getresponse()
                except OSError:
                    return  # the server is away
                content = answer.read()
                if door.mode == "mute" and self.command == "POST":
                    return
                self.send_response(answer.status)
                self.send_header("Content-Type", answer.getheader("Content-Type", "application/json"))
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_PUT = do_PATCH = do_POST  # noqa: N815 - http.server calls them so

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"


@contextmanager
def door_to(port: int) -> Iterator[Door]:
    """A proxy to the server at `port`."""
    door = Door(port)
    threading.Thread(target=door.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield door
    finally:
        door.server.shutdown()
        door.server.server_close()
