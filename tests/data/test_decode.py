"""Pictures as people see them: upright, on white, with their shades, one frame."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

import ilvr_ds
from ilvr_ds.data.decode import _size_of_png, decode_image, image_size, treatments
from ilvr_ds.data.sample import SampleError
from tests.data.packing import png_chunk

TURN, WHITE, SCALE = "turned upright", "with transparency, laid on white", "16-bit grey, scaled to 8 bits"


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def photo(width: int = 20, height: int = 10) -> Image.Image:
    """Each quarter has a colour of its own, so that every turn shows."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2, 0] = 200
    pixels[: height // 2, width // 2 :, 1] = 200
    pixels[height // 2 :, : width // 2, 2] = 200
    return Image.fromarray(pixels)


def oriented(number: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = number
    return exif


def exif_behind_the_pixels(data: bytes, number: int) -> bytes:
    """The PNG with its orientation in the last place that the format allows."""
    body = oriented(number).tobytes().removeprefix(b"Exif\0\0")
    return data[:-12] + png_chunk(b"eXIf", body) + data[-12:]


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
@pytest.mark.parametrize("number", range(1, 9))
def test_the_orientation_of_exif_is_applied(kind: str, number: int) -> None:
    options = {"quality": 95} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    data = saved(photo(), kind, exif=oriented(number), **options)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert decode_image(data).size == upright.size == ((20, 10) if number < 5 else (10, 20))
    assert np.array_equal(decode_image(data), upright)
    assert image_size(data) == upright.size
    assert treatments(data) == ([TURN] if number > 1 else [])


def test_an_orientation_behind_the_pixels_of_a_png_counts() -> None:
    data = exif_behind_the_pixels(saved(photo()), 6)
    assert decode_image(data).size == image_size(data) == (10, 20)
    assert np.array_equal(decode_image(data), photo().transpose(Image.Transpose.ROTATE_270))


@pytest.mark.parametrize("exif", [b"Exif\0\0broken", b"Exif\0\0MM\0*\0\0\0\x08\0\x09", oriented(9).tobytes()])
def test_an_orientation_that_cannot_be_read_turns_nothing(exif: bytes) -> None:
    data = saved(photo(), "JPEG", exif=exif)
    assert decode_image(data).size == image_size(data) == (20, 10)


def test_no_pixel_is_decoded_for_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    files = [saved(photo(), kind, exif=oriented(6)) for kind in ("PNG", "JPEG", "WEBP")] + [saved(photo())]
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("pixels are decoded"))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("pixels are decoded"))
    assert [image_size(data) for data in files] == [(10, 20)] * 3 + [(20, 10)]


def test_a_size_that_is_remembered_hides_nothing() -> None:
    """PNGs of one header: it is parsed once, but another one may be damaged, turned, animated or above a limit."""
    plain, frames = saved(photo(21, 11)), [photo(21, 11), photo(21, 11).rotate(180)]
    assert plain[37:41] == b"IDAT"
    before = _size_of_png.cache_info()
    assert [image_size(plain), image_size(saved(frames[1]))] == [(21, 11)] * 2
    after = _size_of_png.cache_info()
    assert (after.misses, after.hits) == (before.misses + 1, before.hits + 1)
    assert image_size(exif_behind_the_pixels(plain, 6)) == (11, 21)
    with pytest.raises(SampleError, match="animated PNG of 2 frames"):
        image_size(saved(frames[0], save_all=True, append_images=frames[1:]))
    with pytest.raises(SampleError, match="above the limit of 230 pixels"):
        image_size(plain, pixel_limit=230)
    assert image_size(plain, pixel_limit=231) == (21, 11)


def test_a_damaged_beginning_of_a_png_is_what_pillow_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte up to the pixels changed: the same size, or the same words, as without the shorter way."""
    plain = saved(photo(22, 12))
    damaged = [plain[:place] + bytes([new]) + plain[place + 1 :] for place in range(41) for new in (0, 1, 255)]
    damaged += [plain[:end] for end in range(42)]
    assert image_size(plain) == (22, 12)
    short = [size_or_fault(data) for data in damaged]
    monkeypatch.setattr("ilvr_ds.data.decode._PNG_BEGINNING", b"never")
    assert short == [size_or_fault(data) for data in damaged]


def size_or_fault(data: bytes) -> tuple[int, int] | str:
    try:
        return image_size(data)
    except SampleError as error:
        return str(error)


def drawing(mode: str) -> Image.Image:
    """A black line over a transparent ground that is black below; half transparent at its end."""
    alpha = np.zeros((4, 6), np.uint8)
    alpha[1] = (255, 255, 255, 255, 255, 128)
    black = Image.new("RGB" if mode == "RGBA" else "L", (6, 4))
    return Image.merge(mode, (*black.split(), Image.fromarray(alpha)))


@pytest.mark.parametrize(("mode", "kind"), [("RGBA", "PNG"), ("LA", "PNG"), ("RGBA", "WEBP")])
def test_transparency_is_laid_on_white(mode: str, kind: str) -> None:
    data = saved(drawing(mode), kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {}))
    seen = np.asarray(decode_image(data))
    assert (seen[[0, 2, 3]] == 255).all() and (seen[1, :5] == 0).all() and (seen[1, 5] == 127).all()
    assert treatments(data) == [WHITE]


def authors_rgb(image: Image.Image) -> Image.Image:
    """qwen_vl_utils.vision_process.to_rgb, which the authors' training goes through."""
    background = Image.new("RGB", image.size, (255, 255, 255))
    background.paste(image, mask=image.split()[3])
    return background


def test_rgba_is_mixed_as_the_authors_mix_it() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 4), dtype=np.uint8)
    assert np.array_equal(decode_image(saved(Image.fromarray(pixels))), authors_rgb(Image.fromarray(pixels)))


@pytest.mark.parametrize("clear", [1, bytes([255, 0, 128])])
def test_palettes_with_transparency_are_laid_on_white(clear: int | bytes) -> None:
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    image.putpalette([10, 20, 30, 40, 50, 60, 0, 0, 0])
    data = saved(image, transparency=clear)
    last = 0 if isinstance(clear, int) else 127
    assert np.asarray(decode_image(data)).tolist() == [[[10, 20, 30], [255] * 3, [last] * 3]]
    assert treatments(data) == [WHITE]


def png(depth: int, colour: int, row: bytes, clear: bytes) -> bytes:
    """A PNG of two pixels with a transparent colour: Pillow writes none of these itself."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, depth, colour, 0, 0, 0))
    pixels = png_chunk(b"IDAT", zlib.compress(b"\0" + row))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"tRNS", clear) + pixels + png_chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "seen"),
    [
        (png(8, 0, bytes([7, 0]), b"\0\0"), [7, 255]),
        (png(1, 0, bytes([0b01000000]), b"\0\0"), [255, 255]),
        (png(2, 0, bytes([0b01100000]), b"\0\x02"), [85, 255]),
        (png(16, 0, bytes([0x80, 0x80, 0, 0]), b"\0\0"), [128, 255]),
        (png(8, 2, bytes([9, 9, 9, 0, 0, 0]), bytes(6)), [9, 255]),
        (png(16, 2, bytes([9, 1] * 3 + [8, 2] * 3), bytes([8, 2] * 3)), [9, 255]),
    ],
)
def test_a_transparent_colour_becomes_white_at_every_depth(data: bytes, seen: list[int]) -> None:
    assert np.asarray(decode_image(data)).tolist() == [[[value] * 3 for value in seen]]
    assert WHITE in treatments(data)


def test_16_bit_grey_keeps_its_shades() -> None:
    shades = np.linspace(0, 65535, 512).astype(np.uint16).reshape(16, 32)
    data = saved(Image.fromarray(shades))
    seen = np.asarray(decode_image(data))
    assert np.array_equal(seen[..., 0], np.round(shades / 257)) and (seen == seen[..., :1]).all()
    assert treatments(data) == [SCALE]


def test_plain_pictures_are_only_decoded() -> None:
    for kind in ("PNG", "JPEG", "WEBP"):
        data = saved(photo(), kind)
        assert np.array_equal(decode_image(data), Image.open(io.BytesIO(data)).convert("RGB"))
        assert treatments(data) == []


@pytest.mark.parametrize("kind", ["WEBP", "PNG"])
def test_animations_are_refused(kind: str) -> None:
    frames = [photo(), photo().rotate(180)]
    data = saved(frames[0], kind, save_all=True, append_images=frames[1:])
    for look in (decode_image, image_size):
        with pytest.raises(SampleError, match=f"an animated {kind} of 2 frames; store the frame"):
            look(data)


def test_a_photo_with_a_second_picture_beside_it_is_no_animation() -> None:
    """Phones write MPO: a JPEG followed by a depth map, a gain map or the other eye's picture."""
    data = saved(photo(), "MPO", save_all=True, append_images=[photo(8, 8)])
    assert Image.open(io.BytesIO(data)).n_frames == 2
    assert decode_image(data).size == (20, 10)


def test_nothing_else_opens_images() -> None:
    """A second way in would show people or models another picture."""
    package = Path(ilvr_ds.__file__).parent
    found = {str(file.relative_to(package)) for file in package.rglob("*.py") if "Image.open(" in file.read_text()}
    assert found == {"data/decode.py", "tracking/mlflow_copy.py"}  # the latter sends pictures that a run has drawn
