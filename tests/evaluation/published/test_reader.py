"""Copies of published data sets: by the hub's name without a network, and copies that are not as published."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import constants

from ilvr_ds.errors import UserError
from ilvr_ds.evaluation.published.reader import open_published
from ilvr_ds.evaluation.published.table import PUBLISHED
from tests.evaluation.published import copies

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of what was downloaded from the hub, which cannot be reached."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def downloaded(hub: Path, name: str, copy: Callable[[Path], Path]) -> None:
    """A data set as the hub's client leaves it: files are links."""
    folder = hub / f"datasets--{name.replace('/', '--')}"
    copy(folder / "files")
    for file in (folder / "files").rglob("*"):
        link = folder / "snapshots" / COMMIT / file.relative_to(folder / "files")
        if file.is_file():
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(file, link.parent))
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text(COMMIT)


@pytest.mark.parametrize("name", PUBLISHED)
def test_by_name_it_is_what_a_folder_is(name: str, hub: Path, tmp_path: Path) -> None:
    benchmark = PUBLISHED[name]
    downloaded(hub, benchmark.hub, copies.COPIES[name])
    by_name = open_published(benchmark, None)
    by_folder = open_published(benchmark, str(copies.COPIES[name](tmp_path / "copy")))
    assert by_name.location == benchmark.hub
    assert [by_name.read(n) for n in range(len(by_name))] == [by_folder.read(n) for n in range(len(by_folder))]
    assert by_name.fingerprint == by_folder.fingerprint


def test_another_name_of_the_hub(hub: Path) -> None:
    downloaded(hub, "lmms-lab/vstar-bench", copies.vstar_parquet)
    assert len(open_published(PUBLISHED["vstar"], "lmms-lab/vstar-bench")) == 10
    with pytest.raises(UserError, match="--data: no folder and no data set of the hub at 'craigwu/vstar_bench'"):
        open_published(PUBLISHED["vstar"], None)


def test_the_fingerprint_sees_every_word(tmp_path: Path) -> None:
    folder = copies.vstar(tmp_path)
    before = open_published(PUBLISHED["vstar"], str(folder)).fingerprint
    file = folder / "test_questions.jsonl"
    file.write_text(file.read_text().replace("thing 3", "thing 4"))
    assert open_published(PUBLISHED["vstar"], str(folder)).fingerprint != before


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no test_questions.jsonl nor .*as craigwu/vstar_bench has"):
        open_published(PUBLISHED["vstar"], str(copies.mmvp(tmp_path / "mmvp")))
    (tmp_path / "test_questions.jsonl").write_text("")
    with pytest.raises(UserError, match="has no records"):
        open_published(PUBLISHED["vstar"], str(tmp_path))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image": "nowhere.jpg"}, "row 1: 'nowhere.jpg' cannot be read"),
        ({"image": "../secret.jpg"}, "row 1: '../secret.jpg' leaves the folder"),
        ({"image": None}, "row 1: no 'image'"),
        ({"label": None}, "row 1: no 'label'; it has category, image, label, question_id, text"),
        ({"text": "<image> what?"}, None),
        ({"text": "<image><image> what?"}, "row 1: 2 <image> markers in the question but 1 input images"),
    ],
)
def test_records_that_are_not_as_published(change: dict[str, str | None], words: str | None, tmp_path: Path) -> None:
    file = copies.vstar(tmp_path) / "test_questions.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()]
    records[1] |= change
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    reader = open_published(PUBLISHED["vstar"], str(tmp_path))
    if words is None:
        assert reader.read(1).question == change["text"]
        return
    with pytest.raises(UserError) as caught:
        reader.read(1)
    assert words in str(caught.value) and str(caught.value).endswith("copy craigwu/vstar_bench again")


def test_files_that_are_not_as_published(tmp_path: Path) -> None:
    folder = copies.hrbench(tmp_path / "hrbench")
    (folder / "hr_bench_4k.parquet").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match=r"hr_bench_4k\.parquet: is no readable parquet file"):
        open_published(PUBLISHED["hrbench"], str(folder))
    (tmp_path / "test_questions.jsonl").write_text('{"image": "a"}\n{"image"\n')
    with pytest.raises(UserError, match="line 2: is no JSON"):
        open_published(PUBLISHED["vstar"], str(tmp_path))
