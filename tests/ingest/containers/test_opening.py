"""One set of records in every container gives the same samples, and the input says what it was taken for."""

from __future__ import annotations

import base64
import gzip
import json
import tarfile
from pathlib import Path

import pytest
import zstandard

from ilvr_ds.data.sample import Sample
from ilvr_ds.errors import UserError
from ilvr_ds.ingest.containers.opening import open_source
from ilvr_ds.ingest.importers import Importer, Rejected
from ilvr_ds.ingest.pack import pack
from tests.data.packing import image_bytes
from tests.ingest.records import ilvr

RECORDS = [ilvr(id=f"r{n}", text_input=f"Why {n}?") for n in range(20)]
BROKEN = (3, 7, 11, 15, 19)


def records() -> list[dict]:
    """20 records, of which five name an image that is not there."""
    return [record | ({"image_input": "gone.png"} if n in BROKEN else {}) for n, record in enumerate(RECORDS)]


def lines() -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records()).encode()


CONTAINERS = {
    "a.jsonl": (lines, "JSON Lines"),
    "a.json": (lambda: json.dumps(records(), indent=2).encode(), "a JSON array"),
    "a.jsonl.gz": (lambda: gzip.compress(lines()[:500]) + gzip.compress(lines()[500:]), "JSON Lines, compressed"),
    "a.jsonl.zst": (lambda: zstandard.compress(lines()[:500]) + zstandard.compress(lines()[500:]), "JSON Lines, comp"),
    "a.json.gz": (lambda: gzip.compress(json.dumps(records()).encode()), "a JSON array, compressed with gzip"),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_files(root: Path, name: str) -> None:
    made, what = CONTAINERS[name]
    file = root.parent / name
    file.write_bytes(made())
    told: list[str] = []
    source = open_source(file)
    found = [record for _, record in Importer(source, root, tell=told.append)]
    check(found)
    assert told == [f"{file}: {source.what}, taken for ilvr: of {source.unit} 1, it has the key 'sequence_plan'"]
    assert source.what.startswith(what)


def check(found: list[Sample | Rejected]) -> None:
    assert [record.id for record in found] == [f"r{n}" for n in range(20)]
    assert tuple(record.line - 1 for record in found if isinstance(record, Rejected)) == BROKEN
    good = [record for record in found if isinstance(record, Sample)]
    assert all(sample.input_images == (image_bytes(0),) for sample in good)
    assert all(sample.helper_images == (image_bytes(1),) for sample in good)


def test_ids_are_made_of_the_name_without_its_endings(root: Path) -> None:
    file = root.parent / "train.jsonl.gz"
    file.write_bytes(gzip.compress(json.dumps(ilvr()).encode()))
    [(_, sample)] = Importer(open_source(file), root)
    assert sample.id == "train-1"


@pytest.mark.parametrize("packing", ["gzip", "zstd"])
def test_data_that_end_early_are_named_and_nothing_is_left(root: Path, packing: str) -> None:
    compress = gzip.compress if packing == "gzip" else zstandard.compress
    many = b"".join(
        json.dumps(ilvr(note=base64.b64encode(bytes([n % 251] * n)).decode())).encode() + b"\n" for n in range(900)
    )
    file = root.parent / "a.jsonl.x"
    file.write_bytes(compress(many)[:-200])
    with pytest.raises(
        UserError, match=r"a\.jsonl\.x: the (compressed data are damaged|file cannot be read to its end)"
    ):
        pack(file, root, root.parent / "out")
    assert not (root.parent / "out").exists()


def test_the_report_counts_in_the_containers_unit(root: Path) -> None:
    file = root.parent / "a.json"
    file.write_text(json.dumps(records()))
    report = pack(file, root, root.parent / "out")
    assert "  record 4 (r3): input image 'gone.png' is missing below" in "\n".join(report.lines())
    assert report.manifest.source is not None and set(report.manifest.source) == {"file", "sha256"}
    twice = root.parent / "twice.json"
    twice.write_text(json.dumps([ilvr(id="x"), ilvr(id="x")]))
    report = pack(twice, root, root.parent / "again")
    assert report.rejected[0].reason == "the id already stands in record 1"


def test_a_given_format_and_a_second_of_its_family_are_told(root: Path) -> None:
    told: list[str] = []
    file = root.parent / "a.jsonl"
    file.write_bytes(lines())
    list(Importer(open_source(file), root, "mirage", tell=told.append))
    assert told == [f"{file}: JSON Lines, taken for mirage: as --format says"]
    chat = {"conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Ho."}]}
    boxed = chat | {"image": "a.png", "bboxes": [[0, 0, 1, 1]]}
    file.write_text(f"{json.dumps(chat)}\n{json.dumps(boxed)}\n{json.dumps(chat)}\n")
    importer = Importer(open_source(file), root, tell=told.append)
    assert len(list(importer)) == 3
    assert told[1:] == [
        f"{file}: JSON Lines, taken for conversations: of line 1, it has the turns 'conversations'",
        f"{file}: JSON Lines, taken for lvr: of line 2, it has 'conversations' and 'bboxes'",
    ]
    assert importer.formats == {"conversations": 2, "lvr": 1}


def test_subset_and_split_are_for_data_sets(root: Path) -> None:
    file = root.parent / "a.jsonl"
    file.write_bytes(lines())
    with pytest.raises(UserError, match=r"a\.jsonl: --subset and --split are for data set folders"):
        open_source(file, split="train")


@pytest.mark.parametrize("choice", [{"split": "train"}, {"subset": "maze"}])
def test_tars_of_a_folder_are_not_chosen_by_name(root: Path, choice: dict[str, str]) -> None:
    """Catches test data that go into training: every tar would be packed."""
    folder = root.parent / "tars"
    folder.mkdir()
    for split in ("train", "test"):
        tarfile.open(folder / f"{split}-0000.tar", "w").close()
    with pytest.raises(UserError, match=r"tars: it holds tars, .* give one tar, or a folder with those wanted"):
        open_source(folder, **choice)


@pytest.mark.parametrize("name", ["b.tar.gz", "b.tgz", "b.tar.zst"])
def test_compressed_tars_beside_others_are_not_left_out(root: Path, name: str) -> None:
    """Catches half of a data set that is missing in silence."""
    folder = root.parent / "tars"
    folder.mkdir()
    tarfile.open(folder / "a.tar", "w").close()
    (folder / name).write_bytes(b"")
    with pytest.raises(UserError, match=rf"tars: holds a\.tar and, compressed, {name}"):
        open_source(folder)


def test_a_folder_of_tars_is_numbered_through(root: Path) -> None:
    folder = root.parent / "tars"
    folder.mkdir()
    for tar_number in range(2):
        with tarfile.open(folder / f"{tar_number}.tar", "w") as tar:
            for n in range(10 * tar_number, 10 * tar_number + 10):
                path = root.parent / "member"
                path.write_text(json.dumps(records()[n]))
                tar.add(path, f"{n:04d}.json")
    source = open_source(folder)
    assert source.what == "2 webdataset tars"
    check([record for _, record in Importer(source, root)])


def test_tars_of_several_splits_are_not_packed_together(root: Path) -> None:
    """Catches held-out samples that go into training."""
    folder = root.parent / "tars"
    folder.mkdir()
    for name in ("retrained-train-0", "retrained-train-1", "retrained-val-0"):
        tarfile.open(folder / f"{name}.tar", "w").close()
    with pytest.raises(UserError, match=r"splits, retrained-train-1\.tar and retrained-val-0\.tar; put those of one"):
        list(open_source(folder).entries())
    (folder / "retrained-val-0.tar").unlink()
    assert list(open_source(folder).entries()) == []


def test_tars_of_a_folder_are_read_in_the_order_of_their_numbers(root: Path) -> None:
    folder, record = root.parent / "tars", root.parent / "member"
    folder.mkdir()
    record.write_text("{}")
    for number in (10, 2, 1):
        with tarfile.open(folder / f"part-{number}.tar", "w") as tar:
            tar.add(record, f"{number}.json")
    assert [entry.record["id"] for entry in open_source(folder).entries()] == ["1", "2", "10"]
