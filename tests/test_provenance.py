from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ilvr_ds import provenance


def git(folder: Path, *arguments: str) -> None:
    subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments], cwd=folder, check=True)


def test_commit_says_whether_the_code_was_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a dirty flag that sees new files of no account, or does not see edits."""
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "provenance.py"))
    git(tmp_path, "init", "-q")
    assert provenance.commit() == ("unknown", False)
    (tmp_path / "a.py").write_text("1")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "a")
    (tmp_path / "notes").write_text("")
    commit, is_dirty = provenance.commit()
    assert len(commit) == 40 and not is_dirty
    (tmp_path / "a.py").write_text("2")
    assert provenance.commit() == (commit, True)


def test_environment_names_every_rank_and_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/ilvr-ds", "train", "--set", "run.name=a b"])
    here = provenance.machine(torch.device("cpu"))
    found = provenance.environment([here, here])
    assert found["command"] == "ilvr-ds train --set 'run.name=a b'"
    assert len(found["ranks"]) == 2 and found["ranks"][0]["host"] and "cores" in found["ranks"][0]["device"]
    assert found["versions"]["torch"] == torch.__version__ and "flash-attn" not in found["versions"]
