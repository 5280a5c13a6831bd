"""Images that records name: where they may lie, what they may hold."""

import io
import os

import numpy as np
import pytest
from PIL import Image

from ilvr_ds.data.decode import decode_image
from ilvr_ds.data.sample import Sample
from ilvr_ds.ingest.image_files import cut_box
from ilvr_ds.ingest.picture import Box
from tests.data.packing import image_bytes, png_bomb, write_jsonl
from tests.ingest.records import LATENT, ilvr, read, read_records


@pytest.mark.parametrize("path", ["../secret.png", "x/../../secret.png", "x/../a.png", "ABSOLUTE"])
def test_paths_may_not_leave_the_image_root(root, path):
    secret = root.parent / "secret.png"
    secret.write_bytes(image_bytes())
    (root / "x").mkdir()
    (bad,) = read(root, ilvr(image_input=path.replace("ABSOLUTE", str(secret))))
    assert "leaves the image root" in bad.reason


def test_damaged_and_hostile_images_are_rejected(root):
    (root / "bomb.png").write_bytes(png_bomb())
    (root / "big.png").write_bytes(png_bomb(10_000))  # below Pillow's own alarm, above our limit
    (root / "cut.png").write_bytes(image_bytes(size=(64, 64))[:-30])
    (root / "text.png").write_text("no image")
    (root / "image.gif").write_bytes(image_bytes(kind="GIF"))
    os.mkfifo(root / "pipe.png")  # reading it would wait for ever
    names = ["bomb.png", "big.png", "cut.png", "text.png", "image.gif", "pipe.png"]
    bad = read(root, *(ilvr(image_input=name) for name in names))
    assert [name in rejected.reason for name, rejected in zip(names, bad, strict=True)] == [True] * 6
    assert "100000000" in bad[1].reason or "10000x10000" in bad[1].reason
    assert "not a file" in bad[5].reason


def test_an_absolute_path_inside_the_image_root_is_read(root, tmp_path):
    """Also where the root is given relative or as a link."""
    (root / "level_3").mkdir()
    (root / "level_3" / "a.png").write_bytes(image_bytes())
    (tmp_path / "link").symlink_to(root)
    for given in (root, tmp_path / "link"):
        for path in (root / "level_3/a.png", given / "level_3/a.png"):
            record = ilvr(image_input=str(path), sequence_plan=[LATENT | {"helper_image": str(root / "b.png")}])
            [sample] = read_records(write_jsonl(tmp_path / "train.jsonl", [record]), given)
            assert isinstance(sample, Sample), sample
            assert (sample.input_images, sample.helper_images) == ((image_bytes(),), (image_bytes(1),))
            assert sample.group == "level3"


def test_a_file_whose_name_only_looks_the_same_is_named(root):
    """Accents in names come apart on Macs."""
    composed, apart = "caf\u00e9.png", "cafe\u0301.png"
    for there, form, other in ((composed, "NFC", apart), (apart, "NFD", composed)):
        (root / there).write_bytes(image_bytes())
        (good, bad) = read(root, ilvr(image_input=there), ilvr(image_input=other))
        assert isinstance(good, Sample)
        assert f"there is one whose accents are written in another way ({form} of Unicode)" in bad.reason
        (root / there).unlink()


def test_a_box_is_cut_out_of_the_upright_picture():
    """Whole pixels outwards, clamped to the picture; with `region` the picture stays as it is."""
    shades = np.arange(48, dtype=np.uint8).reshape(6, 8)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying: 8x6, shown standing: 6x8
    buffer = io.BytesIO()
    Image.fromarray(shades).save(buffer, "PNG", exif=exif)
    shown = np.asarray(decode_image(buffer.getvalue()))
    part, region = cut_box(buffer.getvalue(), Box((1.5, -2, 4.2, 3)), "crop")
    assert region is None
    assert np.asarray(decode_image(part)).tolist() == shown[0:3, 1:5].tolist()
    whole, region = cut_box(buffer.getvalue(), Box((0.5, 0.25, 2, 1), "fractions"), "region")
    assert whole == buffer.getvalue()
    assert region == (3, 2, 6, 8)


def test_a_path_written_as_on_windows_is_named(root):
    (bad,) = read(root, ilvr(image_input="level_3\\a.png"))
    assert bad.reason.endswith("; it is written as on Windows: write 'level_3/a.png'")
