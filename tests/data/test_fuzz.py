"""Mutated shards, samples, records and images: each is right, or refused by an exception of ours, in bounded memory."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.data.fuzzing import fuzz
from tests.ranks import ROOT

LONG = 14_000


def test_some_mutations(tmp_path: Path) -> None:
    """Always the same ones; catches what any reader lets through soon."""
    outcomes = fuzz(seed=5, count=420, folder=tmp_path)
    targets = {name.partition(":")[0] for name in outcomes}
    assert sum(outcomes.values()) == 420 and len(targets) == 7
    for target in targets:
        kinds = {name for name in outcomes if name.startswith(target)}
        assert len(kinds) > 1, f"{target}: {kinds}: the mutations are too mild or too wild to say anything"


@pytest.mark.drill
@pytest.mark.timeout(900)
def test_many_mutations_in_bounded_memory(capsys: pytest.CaptureFixture[str]) -> None:
    """New ones each time (ILVR_DRILL_SEED repeats them), in a process that may not take 1.5 GB more than it has."""
    seed = os.environ.get("ILVR_DRILL_SEED", str(time.time_ns() % 10**6))
    command = [sys.executable, "-m", "tests.data.fuzzing", "--count", str(LONG), "--seed", seed]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=800, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    report = json.loads(re.search(r"\{.*\}", ended.stdout, re.DOTALL)[0])
    with capsys.disabled():
        print(f"\nfuzzing: seed {seed}, {report['tried']} mutations, peak {report['peak_mb']} MB")
    assert report["tried"] == LONG
