"""Encoded bytes to the picture that a person sees: upright, on white, with all its shades.

Everything that looks at a stored image decodes it here, so that training, evaluation and every page see the same.
"""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Literal

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from ilvr_ds.data.sample import SampleError

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP")
DECODE_PIXEL_LIMIT = 64 * 1024 * 1024
"""No stored image may decode to more pixels than this: a 20 KB PNG can otherwise ask for gigabytes."""
DECODING = 2
"""Version of what is made of the bytes: 1 ignored orientation and transparency and clipped 16-bit grey."""

Treatment = Literal["turned upright", "with transparency, laid on white", "16-bit grey, scaled to 8 bits"]

_WHITE = (255, 255, 255)
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""By EXIF orientation. ImageOps.exif_transpose would also write the EXIF anew, which fails for some cameras' data."""
_ANIMATED = ("WEBP", "PNG")
"""Formats whose frames are an animation; in a JPEG they are other pictures of a camera (MPO)."""
_PNG_TURNS = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")
"""Names of the parts of a PNG that may hold an orientation; they may stand behind the pixels."""
_PNG_BEGINNING = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
"""Signature, and length and name of the first chunk, which ends with its checksum at byte 33."""
_NO_PIXELS = b"\0\0\0\0IDAT"
"""Length and name of a chunk without pixels"""


def decode_image(data: bytes) -> Image.Image:
    """Decode to RGB as a viewer shows it; the size is checked before any pixel is.

    The EXIF orientation is applied, transparency laid on white, 16-bit grey scaled. Raises SampleError for other
    formats, animations, damaged files and images above DECODE_PIXEL_LIMIT pixels.
    """
    with _errors_in_one_line(DECODE_PIXEL_LIMIT):
        image = _open_image(data, DECODE_PIXEL_LIMIT)
        turn = _TURNS.get(_orientation(image, data))
        picture = _on_white(image, data)
        return picture if turn is None else picture.transpose(turn)


def image_size(data: bytes, pixel_limit: int = DECODE_PIXEL_LIMIT) -> tuple[int, int]:
    """Width and height of the decoded image by its header, without its pixels; raises SampleError like decode_image."""
    with _errors_in_one_line(pixel_limit):
        if data.startswith(_PNG_BEGINNING) and data[37:41] == b"IDAT" and not _may_be_turned(data):
            return _size_of_png(data[:33], pixel_limit)
        image = _open_image(data, pixel_limit)
        width, height = image.size
        return (height, width) if _orientation(image, data) >= 5 else (width, height)


def treatments(data: bytes) -> list[Treatment]:
    """What decode_image does to an image besides decoding, by its header; raises SampleError like decode_image."""
    with _errors_in_one_line(DECODE_PIXEL_LIMIT):
        image = _open_image(data, DECODE_PIXEL_LIMIT)
        found: list[Treatment] = ["turned upright"] if _orientation(image, data) != 1 else []
        found += ["with transparency, laid on white"] if image.has_transparency_data else []
        return found + (["16-bit grey, scaled to 8 bits"] if _is_deep(image) else [])


@lru_cache(maxsize=1024)
def _size_of_png(header: bytes, pixel_limit: int) -> tuple[int, int]:
    """Width and height of a PNG of this signature and IHDR, behind which its pixels follow at once.

    Pillow reads no further either: opening an image takes it many times as long as finding its header here.
    """
    return _open_image(header + _NO_PIXELS, pixel_limit).size


def _open_image(data: bytes, pixel_limit: int) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        warnings.filterwarnings("ignore", "Corrupt EXIF", UserWarning)
        image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
    width, height = image.size
    if width * height > pixel_limit:
        raise SampleError(f"image of {width}x{height} pixels is above the limit of {pixel_limit} pixels")
    if image.format in _ANIMATED and (frames := getattr(image, "n_frames", 1)) > 1:
        raise SampleError(f"an animated {image.format} of {frames} frames; store the frame that is meant by itself")
    return image


def _orientation(image: Image.Image, data: bytes) -> int:
    """EXIF's 1 to 8; 1 (as stored) where there is none or it cannot be read, as in viewers."""
    if image.format == "PNG" and not _may_be_turned(data):
        return 1  # else Pillow decodes the pixels to look behind them
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Corrupt EXIF", UserWarning)
            found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except (SyntaxError, ValueError, struct.error):
        return 1
    return found if found in _TURNS else 1


def _may_be_turned(png: bytes) -> bool:
    return any(name in png for name in _PNG_TURNS)


def _is_deep(image: Image.Image) -> bool:
    """Whether Pillow keeps 16 bits of grey, which its conversion to RGB would clip."""
    return image.mode.startswith("I")


def _on_white(image: Image.Image, data: bytes) -> Image.Image:
    """In RGB, mixed with white where the image is transparent."""
    if _is_deep(image):
        image = _shallow(image)
    elif "transparency" in image.info and image.mode != "P":
        image.info["transparency"] = _colour_of_8_bits(image, data)
    if not image.has_transparency_data:
        return image.convert("RGB")
    layers = image.convert("RGBA")
    canvas = Image.new("RGB", image.size, _WHITE)
    canvas.paste(layers, mask=layers.getchannel("A"))
    return canvas


def _shallow(image: Image.Image) -> Image.Image:
    """16-bit grey in 8 bits, rounded; as grey and alpha where one of its shades is transparent."""
    shades = np.asarray(image).astype(np.uint32)
    grey = Image.fromarray(((shades * 255 + 32767) // 65535).astype(np.uint8))
    if (clear := image.info.get("transparency")) is None:
        return grey
    return Image.merge("LA", (grey, Image.fromarray(np.where(shades == clear, 0, 255).astype(np.uint8))))


def _colour_of_8_bits(image: Image.Image, data: bytes) -> int | tuple[int, ...]:
    """The transparent colour of a PNG without alpha, as its pixels are: Pillow leaves it in the file's bits."""
    depth = data[24]
    colour: int | tuple[int, ...] = image.info["transparency"]
    if isinstance(colour, tuple):
        return tuple(part >> 8 for part in colour) if depth == 16 else colour
    return colour * 255 // (2**depth - 1) if image.mode == "L" else colour


@contextmanager
def _errors_in_one_line(pixel_limit: int) -> Iterator[None]:
    """Turn whatever Pillow raises into a SampleError."""
    try:
        yield
    except UnidentifiedImageError as error:  # its text holds the address of an object
        raise SampleError(f"not a {', '.join(IMAGE_FORMATS)} image") from error
    except Image.DecompressionBombError as error:
        raise SampleError(f"image above the limit of {pixel_limit} pixels ({error})") from error
    except (OSError, SyntaxError, ValueError) as error:
        if isinstance(error, SampleError):
            raise
        raise SampleError(f"not a readable {', '.join(IMAGE_FORMATS)} image ({error})") from error
