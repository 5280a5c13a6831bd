"""What a shell is offered, asked as bash asks."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.ranks import ROOT

pytest.importorskip("argcomplete")


def completions(line: str) -> list[str]:
    """Offered at the end of `line`."""
    environment = {
        **os.environ, "_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_TYPE": "9",
        "_ARGCOMPLETE_SUPPRESS_SPACE": "1", "_ARGCOMPLETE_STDOUT_FILENAME": "/dev/stdout",
    }  # fmt: skip
    command = [sys.executable, "-m", "ilvr_ds.cli"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout.replace("\x0b", "\n").split()


def test_commands_options_recipes_keys_and_cards_are_offered() -> None:
    assert {"plan", "train", "export"} <= set(completions("ilvr-ds "))
    assert "--dry-run" in completions("ilvr-ds train --d")
    assert {"comt_3b", "comt_3b_24gb"} <= set(completions("ilvr-ds train --config comt_3"))
    assert completions("ilvr-ds train --set optim.warm") == ["optim.warmup_steps="]
    assert "L40S" in completions("ilvr-ds plan --card L4")
