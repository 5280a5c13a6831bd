"""Where the pages of `ilvr-ds ui` are reached from."""

from __future__ import annotations

import socket

import pytest

from ilvr_ds.errors import UserError
from ilvr_ds.tracking.ui_address import UiAddress


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.9", "localhost", "::1"])
def test_loopback_is_open_to_nobody_else(host: str) -> None:
    address = UiAddress(host, 5000)
    assert address.is_loopback and address.settings() == {} and address.hint({}) == ""
    assert address.shown == address.local == ("http://[::1]:5000" if ":" in host else f"http://{host}:5000")


@pytest.mark.parametrize(("host", "local"), [("0.0.0.0", "127.0.0.1"), ("::", "[::1]"), ("10.0.0.7", "10.0.0.7")])
def test_any_other_host_is_warned_of_in_one_line(host: str, local: str) -> None:
    """Also within an ssh session, where the tunnel is not needed."""
    address = UiAddress(host, 5000)
    assert not address.is_loopback and address.local == f"http://{local}:5000"
    hint = address.hint({"SSH_CONNECTION": "1.2.3.4 40000 10.0.0.7 22"})
    assert "no login" in hint and host in hint and "\n" not in hint and "ssh" not in hint


@pytest.mark.parametrize("host", ["0.0.0.0", "node-7.lab"])
def test_browsers_of_the_network_are_answered(host: str) -> None:
    """By MLflow's rules. Catches its refusal of a machine's name ("Invalid Host header"), and of its pages' posts."""
    rules = pytest.importorskip("mlflow.server.security_utils")
    settings = UiAddress(host, 5000).settings()
    hosts = settings["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")
    origins = settings["MLFLOW_SERVER_CORS_ALLOWED_ORIGINS"].split(",")
    name = socket.gethostname() if host == "0.0.0.0" else host
    assert rules.is_allowed_host_header(hosts, f"{name}:5000") and rules.is_allowed_host_header(hosts, "localhost:5000")
    assert not rules.should_block_cors_request(f"http://{name}:5000", "POST", origins)
    assert not rules.is_allowed_host_header(hosts, "elsewhere.example:5000")
    assert rules.should_block_cors_request("http://elsewhere.example", "POST", origins)


@pytest.mark.parametrize(
    ("environment", "command"),
    [
        ({"SSH_CONNECTION": "1.2.3.4 40000 10.0.0.7 22", "USER": "ada"}, "ssh -L 5001:127.0.0.1:5001 ada@10.0.0.7"),
        ({"SSH_CONNECTION": "::2 4 fd00::7 2222", "LOGNAME": "b"}, "ssh -p 2222 -L 5001:127.0.0.1:5001 b@fd00::7"),
        ({"SSH_CONNECTION": "1.2.3.4 40000 10.0.0.7 22"}, "ssh -L 5001:127.0.0.1:5001 USER@10.0.0.7"),
    ],
)
def test_in_an_ssh_session_the_tunnel_is_said(environment: dict[str, str], command: str) -> None:
    hint = UiAddress("127.0.0.1", 5001).hint(environment)
    assert hint.endswith(f": {command}") and "\n" not in hint
    assert UiAddress("127.0.0.1", 5001).hint({"SSH_CONNECTION": "odd"}) == ""


def test_a_host_of_another_machine_is_an_error() -> None:
    for host, words in (("192.0.2.1", "is another machine's"), ("nowhere.invalid", "is not known")):
        with pytest.raises(UserError, match=f"--host: '{host}' {words}.*; give 127.0.0.1, 0.0.0.0 for all"):
            UiAddress(host, 5000).check()
