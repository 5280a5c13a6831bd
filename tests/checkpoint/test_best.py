from __future__ import annotations

from pathlib import Path

import pytest

from ilvr_ds.checkpoint.best import BEST_FILE, best_checkpoint, name_again, read_best, write_best
from ilvr_ds.checkpoint.files import STATE_FILE, checkpoint_name, list_checkpoints, remove_old
from ilvr_ds.errors import UserError

BEST = {"metric": "eval/ce", "value": 1.25, "step": 20}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for step in (10, 20, 30, 40):
        (tmp_path / checkpoint_name(step)).mkdir()
        (tmp_path / checkpoint_name(step) / STATE_FILE).write_text("{}")
    return tmp_path


def test_the_best_is_named_and_kept(folder: Path) -> None:
    assert read_best(folder) is best_checkpoint(folder) is None
    write_best(folder, BEST)
    assert read_best(folder) == BEST
    assert [path.name for path in folder.iterdir() if path.name.startswith("best")] == [BEST_FILE]
    best = best_checkpoint(folder)
    assert best == folder / checkpoint_name(20)
    remove_old(folder, keep_last=1, best=best)
    assert list_checkpoints(folder) == [folder / checkpoint_name(20), folder / checkpoint_name(40)]
    write_best(folder, {**BEST, "step": 40})
    remove_old(folder, keep_last=1, best=best_checkpoint(folder))
    assert list_checkpoints(folder) == [folder / checkpoint_name(40)], "what was the best goes as others do"


def test_one_that_is_gone_is_not_the_best(folder: Path) -> None:
    write_best(folder, {**BEST, "step": 50})
    assert best_checkpoint(folder) is None


def test_a_best_that_is_still_there_is_named_again(folder: Path) -> None:
    """Where the run went back behind a later one, whose name went with it, or was killed before it named a better."""
    name_again(folder, {**BEST, "step": 50})
    assert read_best(folder) is None, "its checkpoint is gone"
    name_again(folder, BEST)
    assert read_best(folder) == BEST
    name_again(folder, better := {**BEST, "step": 40})
    assert read_best(folder) == better


@pytest.mark.parametrize("text", ["", "{", "[]", '{"metric": "eval/ce"}'])
def test_a_damaged_file_is_named(folder: Path, text: str) -> None:
    (folder / BEST_FILE).write_text(text)
    with pytest.raises(UserError, match=r"best\.json: cannot be read"):
        best_checkpoint(folder)
