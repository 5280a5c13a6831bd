"""Webdataset tars: a sample is what stands side by side with one key, a `KEY.json` and its images."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import BinaryIO

from ilvr_ds.data.sample import SampleError
from ilvr_ds.errors import UserError
from ilvr_ds.ingest.containers.json_lines import parse_or_error
from ilvr_ds.ingest.containers.source import Entry
from ilvr_ds.ingest.image_files import IMAGE_BYTES_LIMIT
from ilvr_ds.ingest.record import Record

_NAME = re.compile(r"((?:.*/)?[^/.]+)\.([^/]+)", re.DOTALL)
"""Webdataset's rule: the key ends at the first dot of the file's name."""
_IMAGES = ("png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff", "avif", "heic", "jp2")
"""Those that cannot be read too, so that they are refused and not passed over."""
_MAX_MEMBERS = 1000


def read_tar(stream: BinaryIO, label: str) -> Iterator[Entry]:
    """The samples of a tar in their order, numbered from 1.

    A record may name an image by its member's name, with or without folders, or by what stands behind the key. Where it
    names none of them, they are put under `image` in the order of their names, 2.png before 10.png. Nothing is
    extracted. Raises UserError where the tar is damaged, and where a sample's members do not stand side by side.
    """
    number, key, members, keys = 0, "", dict[str, bytes](), set[str]()
    try:
        with tarfile.open(fileobj=stream, mode="r|") as tar:
            for info in tar:
                found = _NAME.fullmatch(info.name)
                if not info.isreg() or not found:
                    continue  # folders
                if found[1] != key and members:
                    number += 1
                    yield _entry(number, key, members)
                if found[1] != key:
                    key, members = found[1], {}
                    if key in keys:
                        raise UserError(
                            f"{label}: {info.name} does not stand beside the other members of '{key}'; write the tar "
                            "anew with --sort=name"
                        )
                    keys.add(key)
                if found[2].lower() == "json" or found[2].lower().endswith(_IMAGES):
                    members[found[2]] = _content(tar, info, len(members), label)
            if members:
                yield _entry(number + 1, key, members)
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"{label}: the tar is damaged behind sample {number} ({error})") from error


def _content(tar: tarfile.TarFile, info: tarfile.TarInfo, members: int, label: str) -> bytes:
    if info.size > IMAGE_BYTES_LIMIT or members >= _MAX_MEMBERS:
        raise UserError(f"{label}: {info.name}: above the limit of {IMAGE_BYTES_LIMIT} bytes or {_MAX_MEMBERS} members")
    file = tar.extractfile(info)
    assert file is not None  # it is a regular file
    return file.read()


def _entry(number: int, key: str, members: dict[str, bytes]) -> Entry:
    texts = [name for name in members if name.lower() == "json"]
    if not texts:
        return Entry(number, SampleError(f"'{key}' has no member {PurePosixPath(key).name}.json"))
    record = parse_or_error(members.pop(texts[0]))
    stem = PurePosixPath(key).name
    files = {alias: data for name, data in members.items() for alias in (f"{key}.{name}", f"{stem}.{name}", name)}
    if isinstance(record, SampleError):
        return Entry(number, record)
    record.setdefault("id", key)
    if members and record.get("image") is None and record.get("images") is None and not _names_any(record, files):
        record["image"] = [f"{stem}.{name}" for name in sorted(members, key=by_numbers)]
    return Entry(number, record, files)


def by_numbers(name: str) -> list[str | int]:
    """Sorts names by the numbers in them, not by their digits."""
    return [int(part) if place % 2 else part for place, part in enumerate(re.split(r"(\d+)", name))]


def _names_any(value: Record | list[object] | object, files: dict[str, bytes]) -> bool:
    """Whether a text somewhere in the record is the name of a member; a bare ending is none: formats are "jpg" too."""
    if isinstance(value, dict):
        return any(_names_any(item, files) for item in value.values())
    if isinstance(value, list):
        return any(_names_any(item, files) for item in value)
    return isinstance(value, str) and "." in value and value in files
