"""The page docs/first-hour.md: its commands, typed in their order in an empty folder, print what it says, except for
numbers and for the option that a hardly trained model chooses."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ranks import ROOT, free_port, heeding_ctrl_c

PAGE = ROOT / "docs/first-hour.md"
TYPED_ELSEWHERE = ("git clone", "make demo", "source ")
"""What only a machine of one's own can do; the demo's model and data are written instead."""
NUMBER = re.compile(r"[+-]?\d[\d.,:e+-]*")
CHOICE = re.compile(r"(?<=The final answer is: )[A-D]\b")
"""After 120 steps on ten pictures a processor's rounding decides it."""


def blocks(language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
    return [text for named, text in fenced if named == language]


def files() -> Iterator[tuple[str, str]]:
    """Name and text of the programs that the reader writes."""
    for text in blocks("python"):
        yield text.splitlines()[0].removeprefix("# "), text


def steps() -> list[tuple[str, list[str]]]:
    """Each command and what it prints."""
    found = []
    for block in blocks(""):
        for step in re.split(r"^\$ ", block, flags=re.M)[1:]:
            lines = step.splitlines()
            end = lines.index("END") + 1 if "<<END" in lines[0] else 1
            found.append(("\n".join(lines[:end]), lines[end:]))
    return found


def missing(expected: list[str], printed: str) -> list[str]:
    """The expected lines that do not stand in what was printed, in their order; "..." matches anything."""
    left, lost = _without_chance(printed).splitlines(), []
    for line in (line for line in expected if line.strip() != "..."):
        pattern = re.escape(_without_chance(line)).replace(re.escape("..."), ".*")
        at = next((n for n, other in enumerate(left) if re.fullmatch(pattern, other.rstrip())), None)
        if at is None:
            lost.append(line)
        else:
            del left[: at + 1]
    return lost


def _without_chance(text: str) -> str:
    return NUMBER.sub("N", CHOICE.sub("X", text))


def test_what_is_compared() -> None:
    """Catches a page whose blocks are no longer read, and a comparison that accepts anything."""
    commands = [command for command, _ in steps()]
    assert [name for name, _ in files()] == ["mine/records.py", "mine/ask.py"]
    for name in ("pack", "train", "export", "audit", "serve"):
        assert any(command.startswith(f"ilvr-ds {name}") for command in commands), name
    assert missing(["a 1.5 b", "...", "c ... d"], "x\na 27 b\ny\nc and 3 d\n") == []
    assert missing(["The final answer is: B [1]"], "The final answer is: A [2]\n") == []
    assert missing(["The final answer is: B"], "The final answer is: E\n") == ["The final answer is: B"]
    assert missing(["c", "a"], "a\nc\n") == ["a"] and missing(["a 1"], "b 1\n") == ["a 1"]


@pytest.mark.drill
@pytest.mark.timeout(1200)
def test_its_commands_print_what_it_says(tmp_path: Path) -> None:
    pytest.importorskip("openai")
    port = free_port()
    (tmp_path / "mine").mkdir()
    for name, text in files():
        (tmp_path / name).write_text(text.replace("8000", str(port)))
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, arguments in {"ilvr-ds": "-m ilvr_ds.cli", "python": ""}.items():
        (tools / name).write_text(f'#!/bin/sh\nexec {sys.executable} {arguments} "$@"\n')
        (tools / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("MLFLOW_TRACKING_URI", None)
    demo = "ilvr-ds demo-data --trained --train 16 --held-out 16 --output outputs/demo-data"
    faults, servers = [], []
    try:
        for command, expected in [(demo, []), *steps()]:
            if command.startswith(TYPED_ELSEWHERE):
                continue
            line = command.replace("8000", str(port))
            if line.endswith("&"):
                log = tmp_path / "server.log"
                servers.append(_start(line.removesuffix("&"), log, tmp_path, environment))
                printed, code = _wait_for(log, expected), 0
            else:
                ended = subprocess.run(
                    ["bash", "-c", f"{line} 2>&1"] if "<<END" not in line else ["bash", "-c", line],
                    cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True, timeout=900, check=False,
                )  # fmt: skip
                printed, code = ended.stdout, ended.returncode
            wanted = 2 if any(said.startswith("ilvr-ds: error:") for said in expected) else 0
            if code != wanted or (lost := missing(expected, printed)):
                faults.append(f"$ {line}\ncode {code}, not found: {lost}\n{printed[-3000:]}")
    finally:
        for server in servers:
            server.send_signal(signal.SIGINT)
            server.wait(60)
    assert not faults, "\n".join(faults)


def _start(line: str, log: Path, folder: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    with log.open("w") as file:
        return subprocess.Popen(
            ["bash", "-c", f"exec {line}"], cwd=folder, env=environment, stdout=file, stderr=file,
            preexec_fn=heeding_ctrl_c,
        )  # fmt: skip


def _wait_for(log: Path, expected: list[str]) -> str:
    deadline = time.monotonic() + 300
    while missing(expected, log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return log.read_text()
