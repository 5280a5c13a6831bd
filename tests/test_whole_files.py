from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ilvr_ds.pictures.style import new_figure, save
from ilvr_ds.whole_files import write_whole
from tests.full_disk import files_end_at


@pytest.mark.parametrize("write", [lambda path: write_whole(path, "text"), lambda path: save(new_figure(1.0), path)])
def test_a_second_process_that_writes_the_same_file_takes_nothing_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], None]
) -> None:
    """Catches a common name for what is being written: the second one renames it before the first can."""
    rename, told = Path.replace, []

    def late(self: Path, target: Path) -> Path:
        if not told:
            told.append(self)
            write(target)
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", late)
    write(tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and told


def test_what_cannot_be_written_leaves_the_file_of_before(tmp_path: Path) -> None:
    write_whole(tmp_path / "file", "before")
    with pytest.raises(OSError, match="File too large"), files_end_at(10):
        write_whole(tmp_path / "file", "after" * 10)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]
