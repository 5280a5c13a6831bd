from __future__ import annotations

from dataclasses import replace

import pytest

from ilvr_ds.data.describe import describe_sample
from ilvr_ds.data.sample import LatentStep, Sample, TextStep
from ilvr_ds.data.template import SampleEncoder
from tests.data.packing import image_bytes
from tests.golden_set import GoldenSet

STEPS = (TextStep("first\n"), LatentStep(0), TextStep("Final: C"))
SAMPLE = Sample("s", "Look here", STEPS, (image_bytes(size=(112, 56)),), (image_bytes(size=(56, 84)),), "C", "creation")


@pytest.fixture(scope="module")
def encoder(golden: GoldenSet) -> SampleEncoder:
    return golden.encoder


def test_a_sample_is_told_piece_by_piece(encoder: SampleEncoder) -> None:
    """Sizes are width x height; an image of 4 x 2 merged patches moves the text on by 4 positions, not by 8."""
    assert describe_sample(SAMPLE, encoder, merge_size=2) == [
        "id        s",
        "group     creation",
        "answer    C",
        "tokens    55, of which 12 supervised",
        "segments  1, 8 latent slots each",
        "input 0   112x56 pixels, 8x4 patches, 8 merged features",
        "helper 0  56x84 pixels, 4x6 patches, 6 merged features",
        "",
        "       tokens  mRoPE (t, h, w)            label  content",
        "    0..14      (0, 0, 0)..(14, 14, 14)    -      "
        "'<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n<|im_start|>user\\n<|vision_start|>'",
        "   15..22      (15, 15, 15)..(15, 16, 18) -      [8 image tokens]",
        "   23..34      (19, 19, 19)..(30, 30, 30) -      '<|vision_end|>Look here<|im_end|>\\n<|im_start|>assistant'",
        "   35..40      (31, 31, 31)..(36, 36, 36) yes    '\\nfirst\\n<|latent_start|>'",
        "   41..48      (37, 37, 37)..(44, 44, 44) -      [8 latent tokens]",
        "   49..51      (45, 45, 45)..(47, 47, 47) yes    '<|latent_end|>Final:'",
        "   52..52      (48, 48, 48)               answer ' C'",
        "   53..54      (49, 49, 49)..(50, 50, 50) yes    '<|im_end|>\\n'",
    ]


def test_a_region_is_told_with_its_picture(encoder: SampleEncoder) -> None:
    marked = replace(SAMPLE, steps=(TextStep("first\n"), LatentStep(0, (0, 28, 56, 84)), TextStep("Final: C")))
    assert describe_sample(marked, encoder, merge_size=2)[6].endswith("6 merged features, region [0, 28, 56, 84]")


def test_what_a_sample_lacks_is_a_dash(encoder: SampleEncoder) -> None:
    bare = replace(SAMPLE, group="", answer="", input_images=(), helper_images=(), steps=(TextStep("Final: C"),))
    lines = describe_sample(bare, encoder, merge_size=2)
    assert lines[1:3] == ["group     -", "answer    -"] and lines[4] == "segments  0, 8 latent slots each"
    assert lines[5] == "" and not any("answer" in line for line in lines[7:])


def test_a_small_image_shows_its_own_size_beside_what_it_was_scaled_to(encoder: SampleEncoder) -> None:
    small = replace(SAMPLE, input_images=(image_bytes(size=(30, 20)),))
    assert describe_sample(small, encoder, merge_size=2)[5] == "input 0   30x20 pixels, 6x4 patches, 6 merged features"
