"""Where the pages of `ilvr-ds ui` are reached from: this machine, one's own machine over ssh, or a whole network."""

from __future__ import annotations

import errno
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

from ilvr_ds.addresses import ip_of, is_loopback, url_of
from ilvr_ds.errors import UserError

LOOPBACK = "127.0.0.1"
SSH_PORT = "22"


@dataclass(frozen=True)
class UiAddress:
    """The host (a name or an address of this machine) and port that the server listens on."""

    host: str
    port: int

    @property
    def is_loopback(self) -> bool:
        """Whether nobody outside this machine can reach it."""
        return is_loopback(self.host)

    @property
    def is_every(self) -> bool:
        """Whether it is all addresses of this machine."""
        ip = ip_of(self.host)
        return ip is not None and ip.is_unspecified

    @property
    def local(self) -> str:
        """Address of the pages for programs on this machine."""
        own = "::1" if ":" in self.host else LOOPBACK
        return self._url(own if self.is_every else self.host)

    @property
    def shown(self) -> str:
        """Address of the pages for people: by the machine's name where it listens on all of its addresses."""
        return self._url(socket.gethostname()) if self.is_every else self.local

    def check(self) -> None:
        """Raise UserError if the host is none of this machine, or the port is taken."""
        if not 1 <= self.port <= 65535:
            raise UserError(f"--port: {self.port} is not a port; give 1 to 65535")
        remedy = f"give {LOOPBACK}, 0.0.0.0 for all addresses of this machine, or one of them"
        try:
            family, kind, _, _, place = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)[0]
        except OSError as error:
            raise UserError(f"--host: '{self.host}' is not known ({error.strerror}); {remedy}") from error
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(place)
            except OSError as error:
                if error.errno == errno.EADDRNOTAVAIL:
                    raise UserError(f"--host: '{self.host}' is another machine's; {remedy}") from error
                raise UserError(f"--port: {self.port} is taken ({error.strerror}); give another") from error

    def settings(self) -> dict[str, str]:
        """Variables that make MLflow answer browsers which call this machine by the names of a network.

        By default it answers those alone that say localhost or a private address, and lets only localhost search.
        """
        if self.is_loopback:
            return {}
        names = {self.host} if not self.is_every else {socket.gethostname(), socket.getfqdn(), *_addresses()}
        hosts = sorted(self._url(name).removeprefix("http://") for name in {*names, LOOPBACK, "localhost"})
        origins = sorted(self._url(name) for name in names)
        return {
            "MLFLOW_SERVER_ALLOWED_HOSTS": ",".join(hosts),
            "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS": ",".join(origins),
        }

    def hint(self, environment: Mapping[str, str]) -> str:
        """How to reach it from elsewhere, or what that means; "" if there is nothing to say.

        environment: with sshd's SSH_CONNECTION ("client port server port") within an ssh session.
        """
        if not self.is_loopback:
            return (
                f"warning: MLflow has no login: whoever reaches {self.host} port {self.port} can read, change and "
                "delete runs"
            )
        session = environment.get("SSH_CONNECTION", "").split()
        if len(session) != 4:
            return ""
        _, _, server, ssh_port = session
        user = environment.get("USER") or environment.get("LOGNAME") or "USER"
        option = "" if ssh_port == SSH_PORT else f"-p {ssh_port} "
        forward = f"{self.port}:{self._url(self.host).removeprefix('http://')}"
        return f"on your own machine, before you open it there: ssh {option}-L {forward} {user}@{server}"

    def _url(self, host: str) -> str:
        return url_of(host, self.port)


def _addresses() -> set[str]:
    """Addresses of this machine as its own name leads to them, and the one that it calls others from."""
    found: set[str] = set()
    with suppress(OSError):  # a name that leads nowhere adds nothing
        found |= {str(entry[4][0]) for entry in socket.getaddrinfo(socket.gethostname(), None)}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):  # no network
        probe.connect(("192.0.2.1", 9))  # sends nothing: it chooses a route
        found.add(str(probe.getsockname()[0]))
    return found
