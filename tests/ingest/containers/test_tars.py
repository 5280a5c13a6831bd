"""Webdataset tars: records and their images side by side."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path

import pytest

from ilvr_ds.data.sample import Sample
from ilvr_ds.errors import UserError
from ilvr_ds.ingest.containers import tars
from ilvr_ds.ingest.containers.opening import open_source
from ilvr_ds.ingest.importers import Importer, Rejected
from tests.data.packing import image_bytes

Members = list[tuple[str, bytes]]


def write_tar(path: Path, members: Members) -> Path:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    data = buffer.getvalue()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def chat(text: str = "What?", **changes) -> bytes:
    turns = [{"from": "human", "value": f"<image>{text}"}, {"from": "gpt", "value": "A cat."}]
    return json.dumps({"conversations": turns} | changes).encode()


def read(path: Path, root: Path) -> list[Sample | Rejected]:
    return [record for _, record in Importer(open_source(path), root)]


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
def test_twenty_samples(root: Path, name: str) -> None:
    members: Members = []
    for n in range(15):
        members += [(f"s/{n:04d}.jpg", image_bytes(n, "JPEG")), (f"s/{n:04d}.json", chat())]
    members += [("t/1.json", b"{broken"), ("t/1.jpg", image_bytes(0, "JPEG"))]
    members += [("t/2.jpg", image_bytes(0, "JPEG"))]
    members += [("t/3.json", chat()), ("t/3.png", b"no image")]
    members += [("t/4.json", chat())]
    members += [("t/5.json", chat(image="5.png")), ("t/5.jpg", image_bytes(0, "JPEG"))]
    found = read(write_tar(root.parent / name, members), root)
    assert [sample.id for sample in found[:15]] == [f"s/{n:04d}" for n in range(15)]
    assert [sample.input_images for sample in found[:15]] == [(image_bytes(n, "JPEG"),) for n in range(15)]
    reasons = [
        "not valid JSON",
        "has no member 2.json",
        "input image '3.png': not a",
        "1 <image> markers",
        "'5.png' is",
    ]
    for number, (rejected, reason) in enumerate(zip(found[15:], reasons, strict=True), start=16):
        assert rejected.line == number and reason in rejected.reason, rejected


@pytest.mark.parametrize("kind", ["gif", "BMP", "0.tiff"])
def test_images_of_other_kinds_are_not_passed_over(root: Path, kind: str) -> None:
    """Catches a sample that is packed without them, as a text."""
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A cat."}]
    path = write_tar(root.parent / "a.tar", [("1.json", chat(conversations=turns)), (f"1.{kind}", b"GIF89a")])
    (rejected,) = read(path, root)
    assert isinstance(rejected, Rejected) and f"input image '1.{kind}': not a JPEG, PNG" in rejected.reason


@pytest.mark.parametrize("name", ["1.jpg", "s/1.jpg", "jpg"])
def test_a_record_may_name_a_member(root: Path, name: str) -> None:
    path = write_tar(root.parent / "a.tar", [("s/1.jpg", image_bytes(5, "JPEG")), ("s/1.json", chat(image=name))])
    (sample,) = read(path, root)
    assert sample.input_images == (image_bytes(5, "JPEG"),)


@pytest.mark.parametrize("members", [["jpg"], ["a.jpg", "b.jpg"]])
def test_a_text_that_is_a_bare_ending_names_no_member(root: Path, members: list[str]) -> None:
    """Catches a sample that loses its picture because "jpg" may stand for what is behind the key; names with a stem
    still count as names of members."""
    images = [(f"s/1.{name}", image_bytes(n, "JPEG")) for n, name in enumerate(members)]
    question = "<image>" * (len(members) - 1)
    path = write_tar(root.parent / "a.tar", [*images, ("s/1.json", chat(f"{question}What?", format="jpg"))])
    (sample,) = read(path, root)
    assert isinstance(sample, Sample) and sample.input_images == tuple(data for _, data in images)
    write_tar(path, [*images, ("s/1.json", chat(seen=[members[0], f"1.{members[0]}"]))])
    (rejected,) = read(path, root)
    assert isinstance(rejected, Rejected) and "1 <image> markers in the question but 0 input images" in rejected.reason


def test_images_without_a_name_stand_in_the_order_of_theirs(root: Path) -> None:
    images = [("1.in1.png", image_bytes(2)), ("1.in0.png", image_bytes(1)), ("1.txt", b"ignored")]
    path = write_tar(root.parent / "a.tar", [*images, ("1.json", chat("<image>Same?"))])
    (sample,) = read(path, root)
    assert sample.input_images == (image_bytes(1), image_bytes(2))


def test_numbers_in_names_count_as_numbers(root: Path) -> None:
    """Catches 10.png before 2.png."""
    images = [(f"1.{n}.png", image_bytes(n)) for n in range(12)]
    path = write_tar(root.parent / "a.tar", [*images, ("1.json", chat("<image>" * 11 + "Same?"))])
    (sample,) = read(path, root)
    assert sample.input_images == tuple(image_bytes(n) for n in range(12))


def test_a_tar_that_is_cut_or_too_large_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tar(root.parent / "a.tar", [("1.png", image_bytes(size=(300, 300)) + bytes(5000)), ("1.json", chat())])
    path.write_bytes(path.read_bytes()[:1500])
    with pytest.raises(UserError, match=r"a\.tar: the (tar is damaged|file cannot be read)"):
        read(path, root)
    monkeypatch.setattr(tars, "IMAGE_BYTES_LIMIT", 1000)
    write_tar(path, [("1.png", bytes(1001)), ("1.json", chat())])
    with pytest.raises(UserError, match=r"a\.tar: 1\.png: above the limit of 1000 bytes"):
        read(path, root)


def test_links_and_devices_are_not_read(root: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        link = tarfile.TarInfo("1.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(link)
        info = tarfile.TarInfo("1.json")
        info.size = len(chat())
        tar.addfile(info, io.BytesIO(chat()))
    (root.parent / "a.tar").write_bytes(buffer.getvalue())
    (rejected,) = read(root.parent / "a.tar", root)
    assert "1 <image> markers in the question but 0 input images" in rejected.reason


SAID = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A cat."}]
TRACE = {"Question": "What?", "Text Reasoning Trace": "A cat.", "Final Answer": "cat"}


@pytest.mark.parametrize(
    ("record", "format"), [(TRACE, "zebra-cot"), ({"conversations": SAID, "seen": "1.png"}, "conversations")]
)
def test_an_image_that_the_record_shows_nowhere_is_not_lost(root: Path, record: dict, format: str) -> None:
    members = [("1.json", json.dumps(record).encode()), ("1.png", image_bytes(0))]
    (rejected,) = read(write_tar(root.parent / "a.tar", members), root)
    assert isinstance(rejected, Rejected)
    assert rejected.reason == f"'1.png' came with the record, which shows it nowhere; name it as {format} does"


def test_null_names_no_image(root: Path) -> None:
    members = [("1.json", chat(conversations=SAID, image=None)), ("1.png", image_bytes(0))]
    (sample,) = read(write_tar(root.parent / "a.tar", members), root)
    assert isinstance(sample, Sample) and sample.input_images == (image_bytes(0),)


def test_members_of_a_sample_that_stand_apart_end_it(root: Path) -> None:
    """Catches records that are packed without their images, which come behind all records."""
    turns = chat(conversations=SAID)
    members = [("1.json", turns), ("2.json", turns), ("1.png", image_bytes(0)), ("2.png", image_bytes(1))]
    path = write_tar(root.parent / "a.tar", members)
    with pytest.raises(
        UserError, match=r"a\.tar: 1\.png does not stand beside the other members of '1'; write the tar"
    ):
        read(path, root)
