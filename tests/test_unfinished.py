from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from ilvr_ds.owner import Owner
from ilvr_ds.unfinished import finish, unfinished_folder
from tests.evaluation.exporting import abandoned


def test_only_what_is_certainly_abandoned_is_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches a live writer's folder that goes, another host's, one of another name, and one that nobody signed."""
    to, dead = tmp_path / "my model", abandoned(tmp_path / "my model.partial-dead")
    elsewhere = dataclasses.replace(Owner(), machine="another", process=1, job=None)
    for name, owner in (("live", Owner()), ("elsewhere", elsewhere), ("unsigned", None), ("torn", None)):
        folder = tmp_path / f"my model.partial-{name}"
        folder.mkdir()
        if owner or name == "torn":
            (folder / "writer.json").write_text(owner.to_text() if owner else "{")
    (tmp_path / "my model.partial-file").write_text("")
    abandoned(tmp_path / "my model 2.partial-dead")
    with unfinished_folder(to) as mine:
        (mine / "weights").write_text("")
        assert not dead.exists() and f"{dead}: removed" in caplog.text
        finish(mine, to)
    assert [path.name for path in to.iterdir()] == ["weights"]
    kept = {path.name.partition("-")[2] for path in tmp_path.glob("my model.partial-*")}
    assert kept == {"live", "elsewhere", "unsigned", "torn", "file"}
    assert caplog.text.count(f"if it does not: rm -r '{to}.partial-") == 5
    assert (tmp_path / "my model 2.partial-dead").exists()


def test_what_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="full"), unfinished_folder(tmp_path / "model"):
        raise OSError("full")
    assert not list(tmp_path.iterdir())
