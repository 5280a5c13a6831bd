"""Reads the images of a record: paths that stay below the image root, files that decode, boxes cut out."""

from __future__ import annotations

import io
import stat
import unicodedata
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Literal

from ilvr_ds.data.decode import decode_image, image_size
from ilvr_ds.data.sample import Region, SampleError
from ilvr_ds.ingest.picture import Box, Picture

IMAGE_BYTES_LIMIT = 64 * 1024 * 1024
Helper = Literal["crop", "region"]
"""What a box makes of the image that it lies in: the part inside as a picture, or the whole with its region."""


def read_picture_file(picture: Picture, root: Path, files: Mapping[str, bytes], what: str) -> bytes:
    """The bytes of an image that is in the record, among `files` that came with it, or below `root`.

    Raises SampleError unless it decodes and is within the limits.
    """
    for path in picture.paths if picture.data is None else ():
        if path in files:
            return _checked(files[path], f"{what} '{path}'")
    if picture.data is not None:
        return _checked(picture.data, f"{what}{picture.name}")
    names = [path_below(root, path, what) for path in picture.paths]
    return read_image(root, next((name for name in names if _exists(root / name)), names[0]), what)


def cut_box(data: bytes, box: Box, helper: Helper) -> tuple[bytes, Region | None]:
    """The helper image that a box makes of the image it lies in, and the region there.

    A box that reaches beyond the image is clamped to it, as published loaders do; SampleError where nothing is left.
    "crop": a PNG of the pixels inside, whole pixels outwards, without region. "region": the image as it is.
    """
    width, height = image_size(data)
    scale = (width, height, width, height) if box.unit == "fractions" else (1, 1, 1, 1)
    left, top, right, bottom = (value * by for value, by in zip(box.corners, scale, strict=True))
    left, top, right, bottom = max(0, left), max(0, top), min(width, right), min(height, bottom)
    if left >= right or top >= bottom:
        raise SampleError(f"box {list(box.corners)} in {box.unit} lies outside its image of {width}x{height} pixels")
    if helper == "region":
        return data, (left, top, right, bottom)
    buffer = io.BytesIO()
    part = (int(left), int(top), -int(-right // 1), -int(-bottom // 1))
    decode_image(data).crop(part).save(buffer, "PNG")
    return buffer.getvalue(), None


def path_below(root: Path, name: str, what: str) -> PurePosixPath:
    """A record's path relative to `root`, also where it is absolute.

    Raises SampleError where it leaves the root by itself; links that the user put there are followed.
    """
    path = PurePosixPath(name)
    if path.is_absolute():
        places = (place for place in (root.absolute(), root.resolve()) if path.is_relative_to(place))
        path = next((path.relative_to(place) for place in places), path)
    if path.is_absolute() or ".." in path.parts:
        raise SampleError(f"{what} '{name}': the path leaves the image root {root}")
    return path


def read_image(root: Path, name: PurePosixPath, what: str) -> bytes:
    """The bytes of an image below `root`; raises SampleError unless it decodes and is within the limits."""
    try:
        data = _read_limited(root / name)
        decode_image(data)
    except FileNotFoundError as error:
        hint = _other_spelling(root, name)
        raise SampleError(f"{what} '{name}' is missing below the image root {root}{hint}") from error
    except OSError as error:
        raise SampleError(f"{what} '{name}' cannot be read ({error.strerror})") from error
    except SampleError as error:
        raise SampleError(f"{what} '{name}': {error}") from error
    except ValueError as error:
        raise SampleError(f"{what} {str(name)!r}: no file can have this name") from error
    return data


def _other_spelling(root: Path, name: PurePosixPath) -> str:
    """A hint where the name is written as on Windows, or a file's name looks the same, because one comes from a Mac."""
    if "\\" in str(name):
        return f"; it is written as on Windows: write '{PureWindowsPath(name).as_posix()}'"
    others = {unicodedata.normalize(form, str(name)): form for form in ("NFC", "NFD")}
    there = next((form for other, form in others.items() if other != str(name) and _exists(root / other)), "")
    return f"; there is one whose accents are written in another way ({there} of Unicode): rename it" if there else ""


def _checked(data: bytes, what: str) -> bytes:
    """`data`, if it is an image within the limits."""
    try:
        _check_size(len(data))
        decode_image(data)
    except SampleError as error:
        raise SampleError(f"{what}: {error}") from error
    return data


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that no file can have; read_image says so
        return False


def _read_limited(path: Path) -> bytes:
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise SampleError("not a file")
    _check_size(status.st_size)
    return path.read_bytes()


def _check_size(size: int) -> None:
    if size > IMAGE_BYTES_LIMIT:
        raise SampleError(f"{size} bytes, the limit is {IMAGE_BYTES_LIMIT}")
