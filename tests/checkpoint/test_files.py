from __future__ import annotations

import zlib
from pathlib import Path

import pytest

from ilvr_ds.checkpoint import files
from ilvr_ds.checkpoint.files import checkpoint_name, list_checkpoints, remove_old, saved_state, size_and_checksum
from tests.checkpoint.stand_ins import make_folder, save


def test_only_whole_checkpoints_are_listed_oldest_first(folder: Path) -> None:
    for name in ("step-00000100", "step-00000020", "step-00000300.partial", "step-1", "step-00000010-copy", "best"):
        make_folder(folder / name)
    (folder / "step-00000400").mkdir()
    (folder / "step-00000500").write_text("a file")
    assert [path.name for path in list_checkpoints(folder)] == ["step-00000020", "step-00000100"]


def test_a_run_without_a_folder_has_no_checkpoints(folder: Path) -> None:
    assert list_checkpoints(folder) == []


@pytest.mark.parametrize(("keep", "left"), [(1, [30]), (2, [20, 30]), (5, [10, 20, 30]), (0, [10, 20, 30])])
def test_the_newest_are_kept(folder: Path, keep: int, left: list[int]) -> None:
    for step in (30, 10, 20):
        make_folder(folder / checkpoint_name(step))
    make_folder(folder / "step-00000001.partial")
    make_folder(folder / "best")
    removed = remove_old(folder, keep, 0)
    assert len(removed) + len(left) == 3
    names = {"best", "step-00000001.partial", *map(checkpoint_name, left)}
    assert {path.name for path in folder.iterdir()} == names


def test_a_deletion_that_is_interrupted_leaves_what_the_next_save_deletes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches gigabytes that stay for ever, and a folder in the way of that step's next checkpoint."""
    old, new = (folder / checkpoint_name(step) for step in (1, 2))
    for path in (old, new):
        make_folder(path)
    monkeypatch.setattr(files.shutil, "rmtree", lambda path: (path / "state.json").unlink())
    remove_old(folder, 1)
    assert sorted(path.name for path in folder.iterdir()) == [f"{old.name}.partial", new.name]
    monkeypatch.undo()
    (folder / "step-00000001/student").mkdir(parents=True)  # as older versions left it
    assert save(folder, 1) == old and saved_state(old)["step"] == 1
    assert sorted(path.name for path in folder.iterdir()) == [old.name, new.name]


def test_multiples_of_keep_every_stay(folder: Path) -> None:
    for step in (30, 10, 20, 40):
        make_folder(folder / checkpoint_name(step))
    remove_old(folder, 1, 20)
    assert [path.name for path in list_checkpoints(folder)] == ["step-00000020", "step-00000040"]


@pytest.mark.parametrize("place", [0, 16, -1])
def test_a_checksum_is_of_all_pieces_of_a_file(folder: Path, place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches one of the last piece alone: files are larger than what is read at a time."""
    monkeypatch.setattr(files, "CHUNK", 16)
    path = save(folder, 1)
    file = path / "student/number.pt"
    content = bytearray(file.read_bytes())
    assert size_and_checksum(file) == (len(content), zlib.crc32(content)) and len(content) > 64
    content[place] ^= 1
    file.write_bytes(content)
    assert files.first_fault(path) == f"{file}: damaged (its checksum is another)"


def test_what_was_set_aside_goes_when_the_run_has_come_as_far_again(folder: Path) -> None:
    """Catches terabytes that nothing deletes, and a way that is lost before there is another."""
    asides = [folder / f"{checkpoint_name(step)}.aside-1" for step in (20, 30, 40)]
    for path in (*asides, folder / checkpoint_name(10), folder / checkpoint_name(19)):
        make_folder(path)
    assert remove_old(folder, 5) == []
    make_folder(folder / checkpoint_name(30))
    assert remove_old(folder, 0) == [], "0 keeps everything"
    assert remove_old(folder, 5) == asides[:2]
    assert asides[2].is_dir() and not asides[0].exists()
