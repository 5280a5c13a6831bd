"""Which checkpoint a start takes, whatever it was given and whatever the run has saved."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ilvr_ds.checkpoint.best import best_checkpoint, read_best, write_best
from ilvr_ds.checkpoint.files import checkpoint_name, list_checkpoints
from ilvr_ds.checkpoint.find import branches_off, find_checkpoint, remember, set_aside_newer
from ilvr_ds.errors import UserError
from tests.checkpoint.stand_ins import make_folder, recipe, save
from tests.full_disk import files_end_at


def go_on(checkpoints: Path, resume: str) -> Path | None:
    """What a start does, in this order (training/assembly/start_up.py)."""
    settings = recipe(checkpoints, resume)
    path = find_checkpoint(settings)
    if path:
        set_aside_newer(settings, path)
    remember(settings, path)
    return path


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_auto_and_must_take_the_newest(folder: Path) -> None:
    for step in (9, 10, 100):
        make_folder(folder / checkpoint_name(step))
    for resume in ("auto", "must"):
        assert find_checkpoint(recipe(folder, resume)) == folder / "step-00000100"


def test_a_path_takes_that_checkpoint(folder: Path, tmp_path: Path) -> None:
    make_folder(folder / checkpoint_name(9))
    other = tmp_path / "elsewhere" / checkpoint_name(3)
    make_folder(other)
    assert find_checkpoint(recipe(folder, str(other))) == other


def test_a_new_run_starts_anew_with_auto_and_never(folder: Path) -> None:
    for resume in ("auto", "never"):
        assert find_checkpoint(recipe(folder, resume)) is None


def test_must_without_a_checkpoint_is_a_mistake(folder: Path) -> None:
    make_folder(folder / "step-00000300.partial")
    with pytest.raises(UserError, match=f"checkpoint.resume is must, but {folder} holds no complete checkpoint"):
        find_checkpoint(recipe(folder, "must"))


def test_never_does_not_write_over_an_earlier_run(folder: Path) -> None:
    make_folder(folder / checkpoint_name(9))
    with pytest.raises(UserError, match=f"checkpoint.resume is never, but {folder} holds checkpoints"):
        find_checkpoint(recipe(folder, "never"))


@pytest.mark.parametrize("wanted", ["atuo", "/nowhere/step-00000001", ""])
def test_a_path_that_is_no_checkpoint_is_a_mistake(folder: Path, wanted: str) -> None:
    with pytest.raises(UserError, match=f"'{wanted}' is not a checkpoint; valid: auto, must, never, or a folder"):
        find_checkpoint(recipe(folder, wanted))


@pytest.mark.parametrize("name", ["student/number.pt", "teacher-rank-00000.safetensors", "rng-rank-00000.pt"])
@pytest.mark.parametrize("hurt", [damage, Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-1])])
def test_a_damaged_checkpoint_is_refused_by_name_and_auto_takes_the_one_before(
    folder: Path, name: str, hurt: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    older, newer = save(folder, 1), save(folder, 2)
    hurt(newer / name)
    for resume in ("must", str(newer)):
        with pytest.raises(UserError, match=f"{newer / name}: .*; take another checkpoint"):
            find_checkpoint(recipe(folder, resume))
    with caplog.at_level("WARNING", logger="ilvr_ds"):
        assert go_on(folder, "auto") == older
    assert str(newer / name) in caplog.text
    assert list_checkpoints(folder) == [older]
    assert (folder / "step-00000002.aside-1").is_dir(), "nothing is deleted"


def test_a_damaged_state_is_found(folder: Path) -> None:
    """Catches a flipped digit, after which the file is still JSON."""
    older, newer = save(folder, 1), save(folder, 2)
    file = newer / "state.json"
    file.write_text(file.read_text().replace('"step": 2', '"step": 3', 1))
    assert find_checkpoint(recipe(folder, "auto")) == older


def test_auto_does_not_start_anew_where_no_checkpoint_is_intact(folder: Path) -> None:
    damage(save(folder, 1) / "student/number.pt")
    with pytest.raises(UserError, match=r"no checkpoint in .* is intact"):
        find_checkpoint(recipe(folder, "auto"))


def test_going_on_from_an_older_one_sets_the_newer_aside(folder: Path) -> None:
    """Catches a later restart that takes the abandoned way, and a retention that deletes the new one for the old."""
    paths = [save(folder, step) for step in (10, 20, 30)]
    assert go_on(folder, str(paths[0])) == paths[0]
    assert list_checkpoints(folder) == paths[:1]
    assert go_on(folder, "auto") == paths[0]


@pytest.mark.parametrize(("step", "is_named"), [(10, True), (20, False)])
def test_a_best_that_is_set_aside_is_no_longer_named(folder: Path, tmp_path: Path, step: int, is_named: bool) -> None:
    """Catches the next checkpoint of its step, which `export --best` would take for it."""
    paths = [save(folder, number) for number in (10, 20)]
    write_best(folder, {"metric": "eval/ce", "value": 1.0, "step": step})
    assert go_on(folder, "auto") == paths[-1] and read_best(folder) is not None, "nothing is set aside"
    assert go_on(folder, str(paths[0])) == paths[0]
    save(folder, 20)
    assert best_checkpoint(folder) == (paths[0] if is_named else None)
    assert go_on(folder, str(save(tmp_path / "other", 40))) and read_best(folder) is None


def test_looking_for_a_checkpoint_changes_nothing(folder: Path) -> None:
    """Catches checkpoints that are set aside for a recipe that is refused afterwards."""
    paths = [save(folder, step) for step in (10, 20)]
    assert find_checkpoint(recipe(folder, str(paths[0]))) == paths[0]
    assert list_checkpoints(folder) == paths and [path.name for path in folder.parent.iterdir()] == ["checkpoints"]


@pytest.mark.parametrize("place", ["run/checkpoints", "other/checkpoints"])
@pytest.mark.parametrize("is_gone", [False, True])
def test_a_requeue_with_the_same_path_goes_on_from_what_was_saved_since(
    folder: Path, tmp_path: Path, place: str, is_gone: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a job script that repeats its arguments: each restart would lose what the one before has done."""
    start = save(tmp_path / place, 10)
    for _ in range(2):  # killed before it had saved anything
        assert go_on(folder, str(start)) == start
    saved = [save(folder, step) for step in (20, 30)]
    if is_gone:  # retention deletes it in the run's own folder
        shutil.rmtree(start)
    with caplog.at_level("INFO", logger="ilvr_ds"):
        assert go_on(folder, str(start)) == saved[-1]
    assert [path for path in list_checkpoints(folder) if path != start] == saved
    assert f"to go back once more, delete {folder.parent}/resumed_from.json" in caplog.text
    damage(saved[-1] / "student/number.pt")
    assert go_on(folder, str(start)) == saved[0]


def test_whoever_means_it_goes_back_again(folder: Path, tmp_path: Path) -> None:
    start, other = save(folder, 10), save(tmp_path / "other", 15)
    assert go_on(folder, str(start)) == start
    save(folder, 20)
    (folder.parent / "resumed_from.json").unlink()
    assert go_on(folder, str(start)) == start
    save(folder, 20)
    assert go_on(folder, str(other)) == other, "another path is another wish"
    assert list_checkpoints(folder) == []
    save(folder, 20)
    aside = folder / "step-00000020.aside-2"
    assert go_on(folder, str(aside)) == aside
    assert list_checkpoints(folder) == [] and aside.is_dir()


def test_a_path_counts_again_for_a_run_that_started_anew(folder: Path, tmp_path: Path) -> None:
    other = save(tmp_path / "other", 15)
    assert go_on(folder, str(other)) == other
    assert go_on(folder, "auto") is None
    save(folder, 20)
    assert branches_off(recipe(folder, str(other)))
    assert go_on(folder, str(other)) == other


def test_a_memory_that_cannot_be_read_is_a_mistake(folder: Path) -> None:
    start = save(folder, 10)
    (folder.parent / "resumed_from.json").write_text("[")
    with pytest.raises(UserError, match=r"resumed_from\.json: cannot be read .*; delete it"):
        find_checkpoint(recipe(folder, str(start)))


def test_a_memory_that_cannot_be_written_stays_as_it_was(folder: Path, tmp_path: Path) -> None:
    """Catches a half of it, which the next start could not read."""
    start, other = save(folder, 10), save(tmp_path / "other", 15)
    go_on(folder, str(start))
    file = folder.parent / "resumed_from.json"
    before = file.read_text()
    with files_end_at(10), pytest.raises(UserError, match=r"resumed_from\.json: cannot be written"):
        remember(recipe(folder, str(other)), other)
    assert file.read_text() == before and [path.name for path in folder.parent.glob("resumed*")] == [file.name]
