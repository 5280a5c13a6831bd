from __future__ import annotations

import os
import signal
import socket
import threading
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import requests

from ilvr_ds.cli import main
from ilvr_ds.cli.serve import name_of
from ilvr_ds.errors import UserError
from ilvr_ds.generation.loading import Reasoner
from ilvr_ds.serving import server
from ilvr_ds.serving.limits import Limits


@pytest.fixture(autouse=True)
def no_token_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(server.TOKEN_VARIABLE, raising=False)


@pytest.mark.parametrize("ended_by", [signal.SIGTERM, signal.SIGINT])
def test_it_says_where_it_answers_and_ends_by_a_signal(latent_reasoner: Reasoner, ended_by: signal.Signals) -> None:
    """Catches an address that is said before anybody answers there, a signal that ends the process, and Ctrl-C called
    a fault because a script put the server in the background, where shells let processes ignore it."""
    pytest.importorskip("uvicorn")
    from ilvr_ds.serving.endpoint import Access, Endpoint

    answered: list[int] = []
    said: list[str] = []

    def ask_and_end(address: str) -> None:
        answered.append(requests.get(f"{address}/models", timeout=120).status_code)
        os.kill(os.getpid(), ended_by)

    def say(line: str) -> None:
        said.append(line)
        if line.startswith("tiny answers at "):
            threading.Thread(target=ask_and_end, args=(line.split()[-1],), daemon=True).start()

    endpoint = Endpoint(latent_reasoner, "tiny", Limits(), Access())
    before = signal.signal(ended_by, signal.SIG_IGN)
    try:
        with server.listen("localhost", 0) as listening:
            assert server.serve(endpoint, listening, say) == 0
        assert answered == [200] and said[-1] == "Ctrl-C ends the server" and not endpoint.batches.is_alive
        assert signal.getsignal(ended_by) is signal.SIG_IGN, "as it was"
    finally:
        signal.signal(ended_by, before)


def test_without_its_packages_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(server, "version", version)
    with pytest.raises(UserError, match=r"fastapi is not installed; pip install '.\[serve\]'"):
        server.check_installed()


def test_a_token_comes_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert server.read_token(None) is None
    monkeypatch.setenv(server.TOKEN_VARIABLE, "of-the-environment")
    assert server.read_token(None) == "of-the-environment"
    file = tmp_path / "token"
    file.write_text("of-the-file\n")
    assert server.read_token(file) == "of-the-file"
    for content in (b"", b" \n", b"two words", "s\u00e9cret".encode(), b"\xff"):
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"--token-file .*token: "):
            server.read_token(file)
    with pytest.raises(UserError, match="gone: cannot read it"):
        server.read_token(tmp_path / "gone")


def test_other_machines_need_a_token() -> None:
    for host in ("127.0.0.1", "127.1.2.3", "::1", "localhost"):
        server.check_reach(host, None)
        assert host in server.own_names(host)
    for host in ("0.0.0.0", "::", "192.168.1.2", "node-1"):
        with pytest.raises(UserError, match="other machines reach it; give a token"):
            server.check_reach(host, None)
        server.check_reach(host, "secret")
        assert server.own_names(host) == ("*",)


@pytest.mark.parametrize(
    ("model", "name"),
    [("models/comt_7b", "comt_7b"), ("models/comt_7b/", "comt_7b"), ("owner/name", "name"), ("models:/comt/3", "comt")],
)
def test_a_model_is_named_after_its_place(model: str, name: str) -> None:
    assert name_of(model) == name


def test_a_mistake_is_one_line_before_a_model_is_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        for options, words in (
            (("--port", taken), f"--host 127.0.0.1 --port {taken}: cannot be had"),
            (("--port", 99999), "--port: 99999 is not a port"),
            (("--host", "0.0.0.0"), "--host 0.0.0.0: other machines reach it"),
            (("--token-file", tmp_path / "gone"), "cannot read it"),
            (("--limit-waiting", 0), "--limit-waiting must be 1 or more"),
            (("--limit-images", -1), "--limit-images must be 0 or more"),
            (("--allow-url-images", "http://a.org"), "expected the name of a host"),
            (("--temperature", -1), "--temperature 0 or more"),
            (("--port", 0, "--model", tmp_path / "gone"), "--model"),
        ):
            assert main(["serve", "--model", f"{tmp_path}/gone", *map(str, options)]) == 2
            [line] = capsys.readouterr().err.splitlines()
            assert words in line
