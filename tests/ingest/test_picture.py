"""Images by path, as bytes and as base64."""

from __future__ import annotations

import base64

import pytest

from ilvr_ds.data.sample import SampleError
from ilvr_ds.ingest.picture import Box, Picture, read_box, read_boxes, read_picture
from tests.data.packing import image_bytes
from tests.ingest.records import LATENT, ilvr, read

KINDS = ("PNG", "JPEG", "WEBP")


def in_base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


@pytest.mark.parametrize("kind", KINDS)
def test_bare_base64_is_known_by_its_beginning(kind):
    """JPEG's looks like an absolute path."""
    data = image_bytes(3, kind)
    assert read_picture(in_base64(data)) == Picture(data=data)
    assert read_picture(f"data:image/{kind.lower()};base64,{in_base64(data)}") == Picture(data=data)


@pytest.mark.parametrize("path", ["/9j/a.png", "iVBORw0KGgo.png", "images/UklGR" + 80 * "x" + ".webp", "a b.png"])
def test_paths_stay_paths(path):
    assert read_picture(path) == Picture((path,))


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (b"x", Picture(data=b"x")),
        ({"bytes": b"x", "path": "a.png"}, Picture(("a.png",), b"x")),
        ({"bytes": None, "path": "a.png"}, Picture(("a.png",))),
        ({"bytes": "eA==", "path": None}, Picture(data=b"x")),
        ({"path": None}, None),
        ({}, None),
        ("", None),
        (3, None),
        (None, None),
    ],
)
def test_values(value, wanted):
    assert read_picture(value) == wanted


@pytest.mark.parametrize("value", ["data:image/png;base64,x", "http://x.org/a.png", "s3://b/a.png", {"bytes": "eA=!"}])
def test_damaged_base64_and_addresses(value):
    with pytest.raises(SampleError, match=r"base64 is damaged|is an address; download it"):
        read_picture(value)


def test_every_format_takes_images_that_are_no_paths(root):
    inside = [in_base64(image_bytes(n, kind)) for n, kind in enumerate(KINDS)]
    plan = [LATENT | {"helper_image": {"bytes": inside[2], "path": "../out.png"}}]
    good, damaged = read(
        root,
        ilvr(image_input=[inside[0], f"data:image/jpeg;base64,{inside[1]}"], sequence_plan=plan),
        ilvr(image_input=[in_base64(image_bytes(size=(64, 64))[:-30])]),
    )
    assert good.input_images == (image_bytes(0), image_bytes(1, "JPEG"))
    assert good.helper_images == (image_bytes(2, "WEBP"),)
    assert damaged.reason.startswith("input image: not a readable")


def test_boxes():
    assert read_box([0, 0, 2.5, 1]) == Box((0, 0, 2.5, 1), "pixels")
    for fractions in ([0, 0.5, 1, 1], [0, 0.5, 1.004, 1]):
        with pytest.raises(SampleError, match="looks like fractions; expected pixels"):
            read_box(fractions)
    for wrong in ("0 0 1 1", [0, 0, 1], [0, 0, 1, True], [0, 0, 1, float("inf")]):
        with pytest.raises(SampleError, match="is not"):
            read_box(wrong)


def test_the_boxes_of_a_record_have_one_unit():
    """Rounding makes 1.004 of a box that reaches the edge; taken as pixels, a step would be about the first one."""
    whole, rounded, pixels = (0, 0, 1, 1), (0, 0.5, 1.004, 1), (3, 3, 20, 30)
    assert read_boxes([list(whole), list(rounded)]) == [Box(whole, "fractions"), Box(rounded, "fractions")]
    assert read_boxes([list(pixels)]) == [Box(pixels)]
    for unclear in ([whole, pixels], [pixels, rounded], [(0, 0, 1.5, 1)]):
        with pytest.raises(SampleError, match=r"cannot be told whether the box .* is in fractions or in pixels"):
            read_boxes([list(box) for box in unclear])
