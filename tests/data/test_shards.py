"""Writing, indexing and opening data sets, whole and damaged."""

import dataclasses
import hashlib
import json
import signal
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import webdataset

from ilvr_ds.data import shards, writer
from ilvr_ds.data.members import MemberError, walk_members
from ilvr_ds.data.sample import SampleError
from ilvr_ds.data.shards import INDEX_DTYPE, build_index, file_sha256, open_dataset
from ilvr_ds.data.writer import DatasetWriter, Provenance
from ilvr_ds.errors import UserError
from tests.data.packing import contents, make_dataset, make_sample, serve, write_shards
from tests.full_disk import files_end_at


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """Ten samples in shards of four, four and two."""
    make_dataset(tmp_path / "set")
    return tmp_path / "set"


def edit_manifest(folder: Path, **changes) -> None:
    path = folder / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_dataset_json_says_what_is_there(packed):
    said = json.loads((packed / "dataset.json").read_text())
    assert (said["version"], said["name"], said["samples"], said["longest_tokens"]) == (2, "set", 10, 109)
    assert said["groups"] == {"creation": 5, "deletion": 5}
    assert [shard["samples"] for shard in said["shards"]] == [4, 4, 2]
    for shard in said["shards"]:
        tar, index = packed / shard["name"], (packed / shard["name"]).with_suffix(".idx")
        assert shard["size_bytes"] == tar.stat().st_size
        assert shard["sha256"] == hashlib.sha256(tar.read_bytes()).hexdigest()
        assert shard["index_sha256"] == hashlib.sha256(index.read_bytes()).hexdigest()
    assert said["size_bytes"] == sum(tar.stat().st_size for tar in packed.glob("*.tar"))
    assert {path.suffix for path in packed.iterdir()} == {".json", ".tar", ".idx"}


def test_the_index_agrees_with_the_tar(packed):
    index = np.fromfile(packed / "shard-000001.idx", INDEX_DTYPE)
    assert INDEX_DTYPE.itemsize == 20
    assert index["tokens"].tolist() == [104, 105, 106, 107]
    with tarfile.open(packed / "shard-000001.tar") as tar:
        members = tar.getmembers()
    for number, entry in enumerate(index, start=4):
        mine = [m for m in members if m.name.startswith(f"{number:010d}.")]
        assert mine[0].offset == entry["offset"]
        end = mine[-1].offset_data + -(-mine[-1].size // 512) * 512
        assert end == entry["offset"] + entry["length"]
        data = (packed / "shard-000001.tar").read_bytes()[entry["offset"] : end]
        assert zlib.crc32(data) == entry["crc32"]


def test_webdataset_itself_reads_the_tars(packed):
    found = list(webdataset.WebDataset(str(packed / "shard-000000.tar"), shardshuffle=False))
    assert [json.loads(sample["json"])["id"] for sample in found] == [f"sample-{n}" for n in range(4)]
    assert found[0]["in0.png"] == make_sample(0).input_images[0]


def test_the_same_samples_give_the_same_bytes(packed, tmp_path):
    make_dataset(tmp_path / "again" / "set")
    for path in packed.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / "set" / path.name).read_bytes()


def test_opened_set(packed):
    opened = open_dataset(packed, "full")
    assert len(opened) == 10 and opened.shard_sizes == (4, 4, 2)
    assert opened.tokens.tolist() == list(range(100, 110))
    assert opened.fingerprint == hashlib.sha256((packed / "dataset.json").read_bytes()).hexdigest()
    opened.check_trainable()


def test_bytes_limit_closes_shards(tmp_path):
    manifest = write_shards(((make_sample(n), 0) for n in range(5)), tmp_path / "set", max_shard_bytes=1)
    assert [shard.samples for shard in manifest.shards] == [1] * 5


def test_samples_without_a_plan_cannot_be_trained_on(tmp_path):
    write_shards(((make_sample(n, plan=n != 1), 0) for n in range(3)), tmp_path / "set")
    with pytest.raises(UserError, match=r"1 of 3 samples have no plan"):
        open_dataset(tmp_path / "set").check_trainable()


@pytest.mark.parametrize("name", ["100%", "%s-%d", "pipe:touch ran"])
def test_odd_folder_names_are_only_names(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_dataset(Path(name))
    assert len(open_dataset(tmp_path / name, "full")) == 10
    assert not (tmp_path / "ran").exists()


def test_a_folder_in_the_way(packed, tmp_path):
    with pytest.raises(UserError, match=r"set: is not empty"):
        make_dataset(packed)
    foreign = tmp_path / "holiday"
    foreign.mkdir()
    (foreign / "photo").write_text("dear")
    with pytest.raises(UserError, match=r"something other than a packed data set"):
        write_shards([(make_sample(0), 0)], foreign, overwrite=True)
    with pytest.raises(UserError, match=r"is a file"):
        make_dataset(foreign / "photo")
    assert (foreign / "photo").read_text() == "dear"
    (tmp_path / "empty").mkdir()
    make_dataset(tmp_path / "empty")
    with pytest.raises(UserError, match=r"/proc: is a mount point; give a folder below it"):
        make_dataset(Path("/proc"))


@pytest.mark.parametrize("size", [1_000, 174_000])
def test_a_full_disk_is_a_line_and_leaves_nothing(tmp_path, size):
    """Catches a traceback after hours: at the begin of a tar, and at its end."""
    with files_end_at(size), pytest.raises(UserError, match=r"set: cannot be written \(File too large\)"):
        write_shards([(make_sample(n), 0) for n in range(40)], tmp_path / "set")
    assert not list(tmp_path.iterdir())


def test_what_lies_in_a_data_set_besides_is_not_overwritten(packed):
    """Stored vision features lie there unless told otherwise."""
    (packed / "features").mkdir()
    with pytest.raises(UserError, match=r"set/features: is no part of the data set there"):
        write_shards([(make_sample(0), 0)], packed, overwrite=True)
    assert (packed / "features").is_dir()


def test_of_two_writers_the_second_does_not_overwrite_the_first(tmp_path):
    """Catches a data set that is deleted without --overwrite, because it was not there yet at the start."""
    first, second = (DatasetWriter(tmp_path / "set") for _ in range(2))
    with first, second:
        for number, one in enumerate((first, second)):
            one.write(make_sample(number))
        made = first.finish(Provenance())
        with pytest.raises(UserError, match=r"set: is not empty"):
            second.finish(Provenance())
    assert open_dataset(tmp_path / "set", "full").manifest == made
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_overwriting_replaces_the_whole(packed, tmp_path):
    write_shards([(make_sample(0), 0)], packed, overwrite=True)
    assert sorted(path.name for path in packed.iterdir()) == ["dataset.json", "shard-000000.idx", "shard-000000.tar"]
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_a_failure_leaves_what_was_there_before(packed, tmp_path):
    before = contents(packed)

    def samples():
        yield from ((make_sample(n), 0) for n in range(5))
        raise KeyboardInterrupt

    for output in (packed, tmp_path / "new"):
        with pytest.raises(KeyboardInterrupt):
            write_shards(samples(), output, max_samples_per_shard=2, overwrite=True)
    assert contents(packed) == before
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_a_tar_that_comes_out_wrong_leaves_nothing(tmp_path, monkeypatch):
    def refuse(*_):
        raise MemberError("the disk lies")

    monkeypatch.setattr(writer, "build_index", refuse)
    with pytest.raises(MemberError, match=r"the disk lies"):
        make_dataset(tmp_path / "set")
    assert not list(tmp_path.iterdir())


def test_nothing_to_write(tmp_path):
    with pytest.raises(UserError, match=r"there are no samples"):
        write_shards([], tmp_path / "set")
    assert not list(tmp_path.iterdir())


KILLED = """
import os, signal, sys
from pathlib import Path
from ilvr_ds.data.writer import DatasetWriter
writer = DatasetWriter(Path(sys.argv[1])).__enter__()
(writer.folder / "shard-000000.tar").write_bytes(bytes(10000))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_pack_left_is_removed_by_the_next(tmp_path):
    """The first of a live process stays."""
    with DatasetWriter(tmp_path / "set") as alive:
        child = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "set"], check=False)
        assert child.returncode == -signal.SIGKILL and len(list(tmp_path.iterdir())) == 2
        make_dataset(tmp_path / "set")
        assert sorted(tmp_path.iterdir()) == [tmp_path / "set", alive.folder]
        assert not (tmp_path / "set/writer.json").exists()


def test_a_refused_sample_leaves_no_gap(tmp_path):
    with DatasetWriter(tmp_path / "set") as dataset:
        dataset.write(make_sample(0))
        with pytest.raises(SampleError):
            dataset.write(dataclasses.replace(make_sample(1), id=""))
        dataset.write(make_sample(2))
        assert dataset.finish(Provenance(rejected=1)).samples == 2
    assert len(open_dataset(tmp_path / "set", "full")) == 2


def pickle_member() -> bytes:
    info = tarfile.TarInfo("0000000003.pkl")
    info.size = 4
    return info.tobuf() + b"evil".ljust(512, b"\0")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda members, end: members + pickle_member() + end, r"0000000003.pkl.* is not allowed"),
        (lambda members, end: members, r"end-of-archive marker is missing"),
        (lambda members, end: members + end[:512], r"end-of-archive marker is missing"),
        (lambda members, end: members + end + b"x", r"end-of-archive marker is missing"),
        (lambda members, end: members + end + members + end, r"end-of-archive marker is missing"),
        (lambda members, end: members[:-512], r"is cut off"),
        (lambda members, end: members.replace(b"0000000002.in0", b"0000000009.in0") + end, r"damaged header"),
    ],
)
def test_an_index_is_made_only_for_a_whole_tar(packed, damage, message):
    tar = packed / "shard-000000.tar"
    data = tar.read_bytes()
    end = walk_members(data)[-1].end
    tar.write_bytes(damage(data[:end], data[end:]))
    with pytest.raises(MemberError, match=message):
        build_index(tar, 0, [1, 2, 3, 4])


def test_an_index_is_made_only_for_the_expected_keys(packed):
    tar = packed / "shard-000000.tar"
    assert len(build_index(tar, 0, [1, 2, 3, 4])) == 4
    for first, tokens in ((1, [1] * 4), (0, [1] * 3), (0, [1] * 5)):
        with pytest.raises(MemberError, match=r"found 4"):
            build_index(tar, first, tokens)


@pytest.mark.parametrize("location", ["nowhere", "."])
def test_no_data_set(tmp_path, location):
    with pytest.raises(UserError, match=r"dataset.json: .*expected a folder that `ilvr-ds pack` wrote"):
        open_dataset(tmp_path / location)


@pytest.mark.parametrize("location", ["pipe:touch ran", "file:///tmp", "s3://bucket/set", "hdfs://x"])
def test_only_folders_and_web_addresses(tmp_path, monkeypatch, location):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"is not supported.*; give a local folder or an http"):
        open_dataset(location)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 1}, "version 1 is unknown to this release .it reads 2.; pack the data again"),
        ({"version": None}, "version None is unknown"),
        ({"samples": 0, "size_bytes": 0, "groups": {}, "shards": []}, "has 0 samples"),
        ({"samples": 11}, "a total of 11 is not the sum of its parts, 10"),
        ({"groups": {"a": "x"}}, "a count that is no number"),
        ({"shards": 3}, "not a valid data set description"),
        ({"shards": [{"name": "shard-000000.tar"}]}, "not a valid data set description"),
        ({"extra": 3}, "not a valid data set description"),
    ],
)
def test_a_damaged_description(packed, changes, message):
    edit_manifest(packed, **changes)
    with pytest.raises(UserError, match=f"set/dataset.json: .*{message}"):
        open_dataset(packed)


@pytest.mark.parametrize("name", ["../shard-000000.tar", "/etc/passwd", "shard-000000.tar\n", 7])
def test_shard_names_cannot_point_elsewhere(packed, name):
    shards = json.loads((packed / "dataset.json").read_text())["shards"]
    edit_manifest(packed, shards=[shards[0] | {"name": name}, *shards[1:]])
    with pytest.raises(UserError, match=r"not a valid data set description"):
        open_dataset(packed)


def test_description_that_is_no_json(packed):
    (packed / "dataset.json").write_text("{")
    with pytest.raises(UserError, match=r"not a valid data set description"):
        open_dataset(packed)


def test_an_index_of_another_shard(packed):
    (packed / "shard-000000.idx").write_bytes((packed / "shard-000001.idx").read_bytes())
    with pytest.raises(UserError, match=r"shard-000000.idx: is not the index that was packed with shard-000000.tar"):
        open_dataset(packed)


def test_an_index_that_does_not_fit_even_if_its_sum_is_right(packed):
    index = np.fromfile(packed / "shard-000000.idx", INDEX_DTYPE)
    index["length"][1] += 512
    index.tofile(packed / "shard-000000.idx")
    shards = json.loads((packed / "dataset.json").read_text())["shards"]
    shards[0]["index_sha256"] = hashlib.sha256(index.tobytes()).hexdigest()
    edit_manifest(packed, shards=shards)
    with pytest.raises(UserError, match=r"shard-000000.idx: does not fit shard-000000.tar"):
        open_dataset(packed)


def test_missing_files_and_a_truncated_tar_are_named(packed):
    tar = packed / "shard-000002.tar"
    data = tar.read_bytes()
    tar.write_bytes(data[:-512])
    with pytest.raises(UserError, match=r"shard-000002.tar: has \d+ bytes, \d+ were packed"):
        open_dataset(packed)
    tar.unlink()
    with pytest.raises(UserError, match=r"shard-000002.tar: cannot be read"):
        open_dataset(packed)
    (packed / "shard-000001.idx").unlink()
    with pytest.raises(UserError, match=r"shard-000001.idx: cannot be read"):
        open_dataset(packed)


def test_flipped_bytes_are_found_by_full_verification(packed):
    flip(packed / "shard-000001.tar", 700)
    open_dataset(packed, "quick")
    with pytest.raises(UserError, match=r"shard-000001.tar: its bytes are not those that were packed"):
        open_dataset(packed, "full")


@pytest.mark.parametrize("step", [512, 1000])
def test_sums_are_of_the_whole_file_piece_by_piece(packed, monkeypatch, step):
    """Catches a file above one piece of which the same piece is summed again and again."""
    monkeypatch.setattr(shards, "_HASH_STEP", step)
    tar = packed / "shard-000001.tar"
    assert tar.stat().st_size > 3 * step
    assert file_sha256(tar) == hashlib.sha256(tar.read_bytes()).hexdigest()
    open_dataset(packed, "full")
    for position in (0, step, tar.stat().st_size - 1):
        flip(tar, position)
        with pytest.raises(UserError, match=r"shard-000001.tar: its bytes are not those that were packed"):
            open_dataset(packed, "full")
        flip(tar, position)


def test_over_http(packed):
    with serve(packed) as (address, handler):
        opened = open_dataset(address)
        assert [path for path, span in handler.requests if span] == ["/shard-000000.tar"], "one size is asked for"
        assert (opened.index == open_dataset(packed).index).all()
        assert opened.fingerprint == open_dataset(packed).fingerprint
        flip(packed / "shard-000002.tar", 700)
        with pytest.raises(UserError, match=r"^http://.*/shard-000002.tar: its bytes are not those"):
            open_dataset(address, "full")
        with pytest.raises(UserError, match=r"the server has no such file .404.; expected a folder"):
            open_dataset(address + "/elsewhere")
