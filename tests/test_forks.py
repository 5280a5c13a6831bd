"""A fork that said 0 whatever happened, or saw this process's environment, would let many tests pass."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests import forks
from tests.forks import Fork

PROGRAM = """
import os, signal, sys
line = sys.stdin.readline().strip() if sys.argv[1] == "read" else ""
print(sys.argv[1:], os.getcwd(), sorted(os.environ), __name__, line, flush=True)
if sys.argv[1] == "raise":
    raise ValueError("as asked")
if sys.argv[1] == "die":
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[1] == "sleep":
    signal.pause()
sys.exit(3)
"""


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "program_of_a_test.py").write_text(PROGRAM)
    return {"A": "1"}


def test_it_ends_as_the_module_ends(env: dict[str, str], tmp_path: Path) -> None:
    said = forks.run("program_of_a_test", "exit", "a b", env=env, cwd=tmp_path)
    assert said.returncode == 3 and said.stderr == ""
    assert said.stdout == f"['exit', 'a b'] {tmp_path} ['A'] __main__ \n"
    raised = forks.run("program_of_a_test", "raise", env=env, cwd=tmp_path)
    assert raised.returncode == 1 and raised.stderr.endswith("ValueError: as asked\n")
    assert forks.run("program_of_a_test", "die", env=env, cwd=tmp_path).returncode == -9
    assert "A" not in os.environ


def test_it_reads_what_is_sent(env: dict[str, str], tmp_path: Path) -> None:
    process = Fork("program_of_a_test", "read", env=env, out=tmp_path / "out", cwd=tmp_path, has_input=True)
    process.send("hello")
    assert process.wait(60) == 3 and (tmp_path / "out").read_text().endswith(" hello\n")


def test_what_does_not_end_is_waited_for_as_long_as_asked_and_killed(env: dict[str, str], tmp_path: Path) -> None:
    process = Fork("program_of_a_test", "sleep", env=env, out=tmp_path / "out", cwd=tmp_path)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    assert process.poll() is None
    process.kill()
    assert process.wait(60) == -9
