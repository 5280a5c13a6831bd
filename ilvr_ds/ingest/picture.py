"""The image that a record names or holds: by path, as bytes, or as base64; and the box in it that a step is about."""

from __future__ import annotations

import base64
import binascii
import math
import re
from dataclasses import dataclass
from typing import Any, Literal

from ilvr_ds.data.sample import SampleError

Unit = Literal["pixels", "fractions"]

_DATA_URL = re.compile(r"data:image/[\w.+-]+;base64,", re.IGNORECASE)
_BARE_BASE64 = re.compile(r"(?:iVBORw0KGgo|/9j/|UklGR)[A-Za-z0-9+/\s]{52,}={0,2}")
"""PNG, JPEG and WebP begin with these letters in base64; no path is taken for one unless it is as long as an image."""
_ADDRESS = re.compile(r"(?:https?|s3|gs|ftp|file)://", re.IGNORECASE)
_MOST_FRACTION = 1.02
LEAST_PIXELS = 2
"""The largest number of a box in fractions, and the least one for pixels: no step is about the first pixel alone."""


@dataclass(frozen=True)
class Box:
    """A part of an image: left, top, right, bottom from its top left corner, in `unit`s of the upright image."""

    corners: tuple[float, float, float, float]
    unit: Unit = "pixels"


@dataclass(frozen=True)
class Picture:
    """An image before it is read. `data` are its encoded bytes; without them it lies at the first of `paths` that is a
    file. `box` is the part that a latent step is about."""

    paths: tuple[str, ...] = ()
    data: bytes | None = None
    box: Box | None = None

    @property
    def name(self) -> str:
        """What messages call it."""
        return f" '{self.paths[0]}'" if self.paths else ""


def read_picture(value: Any) -> Picture | None:
    """The image of a JSON or table value; None where the value is none.

    Text is a path, a data URL or base64; an object has `bytes` (which may be base64), `path` or both, as the `datasets`
    library stores images. Raises SampleError for damaged base64 and for addresses: nothing is downloaded.
    """
    if isinstance(value, bytes):
        return Picture(data=value)
    if isinstance(value, dict):
        return _read_object(value)
    if not isinstance(value, str) or not value:
        return None
    if found := _DATA_URL.match(value):
        return Picture(data=_decode(value[found.end() :]))
    if _BARE_BASE64.fullmatch(value.rstrip()):
        return Picture(data=_decode(value))
    if _ADDRESS.match(value):
        raise SampleError(f"image '{value}' is an address; download it and give its path")
    return Picture((value,))


def read_box(values: Any) -> Box:
    """A box of four numbers in pixels; raises SampleError for other values, and for fractions."""
    box = Box(_corners(values))
    if max(box.corners) < LEAST_PIXELS:
        raise SampleError(f"the box {list(box.corners)} looks like fractions; expected pixels")
    return box


def read_boxes(values: list[Any]) -> list[Box]:
    """The boxes of a record, which are all in fractions of width and height or all in pixels.

    Fractions may be a little above 1, as rounding makes them. Raises SampleError where the unit cannot be told.
    """
    boxes = [_corners(box) for box in values]
    if all(max(box) <= _MOST_FRACTION for box in boxes):
        return [Box(box, "fractions") for box in boxes]
    if unclear := next((box for box in boxes if max(box) < LEAST_PIXELS), None):
        raise SampleError(f"it cannot be told whether the box {list(unclear)} is in fractions or in pixels")
    return [Box(box) for box in boxes]


def _corners(values: Any) -> tuple[float, float, float, float]:
    is_box = isinstance(values, list) and len(values) == 4 and all(type(x) in (int, float) for x in values)
    if not is_box or not all(map(math.isfinite, values)):
        raise SampleError(f"box {values!r} is not [left, top, right, bottom]")
    left, top, right, bottom = values
    return left, top, right, bottom


def _read_object(value: dict[str, Any]) -> Picture | None:
    data, path = value.get("bytes"), value.get("path")
    paths = (path,) if isinstance(path, str) and path else ()
    if isinstance(data, str) and data:
        data = _decode(_DATA_URL.sub("", data, count=1))
    if isinstance(data, bytes):
        return Picture(paths, data)
    return read_picture(path) if paths else None


def _decode(letters: str) -> bytes:
    try:
        return base64.b64decode("".join(letters.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise SampleError(f"an image in base64 is damaged ({error})") from error
