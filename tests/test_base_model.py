"""A model by name is fetched once for each host, whatever the number of ranks; against a small hub."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import ROOT, free_port, rank_environment

NAME, COMMIT = "someone/tiny", "0123456789abcdef0123456789abcdef01234567"
OLDER = "fedcba9876543210fedcba9876543210fedcba98"
GONE = "a" * 40
FILES = {"config.json": b'{"a": 1}', "model.safetensors": b"weights" * 1000, "README.md": b"not needed"}
PROGRAM = """
import os, sys
from datetime import timedelta
from ilvr_ds import dist
from ilvr_ds.errors import UserError
from ilvr_ds.base_model import model_on_host
dist.join_on_host(timedelta(seconds=120))
try:
    print(model_on_host(*sys.argv[1:]))
except UserError as error:
    print(error)
dist.barrier()
sys.stdout.flush()
os._exit(0)
"""


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Hub(ThreadingHTTPServer):
    """Answers what `snapshot_download` asks, and counts it."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        super().__init__(("127.0.0.1", 0), _Answers)


class _Answers(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        """Metadata of the repository, or a file."""
        commit = OLDER if OLDER in self.path else COMMIT
        if GONE in self.path:
            self.send_error(404)
        elif self.path.startswith(f"/api/models/{NAME}"):
            self.server.asked["repository"] += 1
            listed = [{"type": "file", "path": n, "size": len(data), "oid": _digest(data)} for n, data in FILES.items()]
            siblings = [{"rfilename": name} for name in FILES]
            about = {"id": NAME, "sha": commit, "siblings": siblings, "private": False}
            self._send(json.dumps(listed if "/tree/" in self.path else about).encode())
        else:
            self.server.asked[self.path.rpartition("/")[2]] += 1
            self._send_file()

    def do_HEAD(self) -> None:
        """What a file is like."""
        self._send_file()

    def log_message(self, *_: Any) -> None:
        """Says nothing."""

    def _send_file(self) -> None:
        name = self.path.rpartition("/")[2]
        commit = next((c for c in (COMMIT, OLDER) if self.path.startswith(f"/{NAME}/resolve/{c}/")), None)
        if commit is None or name not in FILES:
            self.send_error(404)
            return
        self._send(FILES[name], {"X-Repo-Commit": commit, "ETag": f'"{_digest(FILES[name])}"'})

    def _send(self, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(200)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def on_hosts(hub: Hub, folder: Path, *arguments: str, hosts: int = 2) -> list[str]:
    """What each rank found, two on a host; a host has a cache of its own."""
    local, port, ranks = 2, free_port(), []
    for rank in range(hosts * local):
        fixed = rank_environment(rank, hosts * local, port) | {"LOCAL_RANK": str(rank % local)}
        fixed |= {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(folder / f"h{rank // local}")}
        fixed |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_XET": "1"}
        command = [sys.executable, "-c", PROGRAM, *arguments]
        ranks.append(subprocess.Popen(command, cwd=ROOT, env=fixed, stdout=subprocess.PIPE, text=True))
    answers = [rank.communicate(timeout=240)[0].strip() for rank in ranks]
    assert not any(rank.returncode for rank in ranks)
    return answers


def test_a_file_is_fetched_once_for_each_host(hub: Hub, tmp_path: Path) -> None:
    answers = on_hosts(hub, tmp_path, NAME)
    for rank, answer in enumerate(answers):
        folder = Path(answer)
        assert folder.is_relative_to(tmp_path / f"h{rank // 2}") and folder.name == COMMIT
        assert sorted(file.name for file in folder.iterdir()) == ["config.json", "model.safetensors"]
        assert (folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert {name: hub.asked[name] for name in FILES} == {"config.json": 2, "model.safetensors": 2, "README.md": 0}
    assert hub.asked["repository"] <= 6, "the main rank asks, then the first of each host: for the version and the list"


def test_a_pinned_commit_is_taken_whatever_is_newest(hub: Hub, tmp_path: Path) -> None:
    """As a run that goes on does; a commit that the hub has no more is one line."""
    [answer] = set(on_hosts(hub, tmp_path, NAME, OLDER, hosts=1))
    assert Path(answer).name == OLDER and (Path(answer) / "config.json").read_bytes() == FILES["config.json"]
    [answer] = set(on_hosts(hub, tmp_path, NAME, GONE, hosts=1))
    assert answer.startswith(f"model.path: no model at '{NAME}', commit {GONE} (")


def test_a_name_that_nobody_has_is_the_same_line_on_every_rank(hub: Hub, tmp_path: Path) -> None:
    [answer] = set(on_hosts(hub, tmp_path, "someone/else", hosts=1))
    assert answer.startswith("model.path: no model at 'someone/else' (")
