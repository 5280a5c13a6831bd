"""Images to patches and bookkeeping, against the stock image processor and transformers' own functions."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids, get_vision_window_index

from ilvr_ds.data.images import ImageEncoder, VisionLayout, attention_bookkeeping
from ilvr_ds.data.sample import SampleError
from ilvr_ds.errors import UserError
from tests.data.packing import image_bytes, noise_png
from tests.data.test_decode import authors_rgb
from tests.golden_set import DEFAULT

PROCESSOR = str(DEFAULT / "processor")  # between 3136 (56 x 56) and 802816 pixels
SIZES = [(112, 84), (100, 61), (200, 30), (5, 5), (1500, 900)]
LAYOUT = VisionLayout(patch_size=14, merge_size=2, window_size=112)


@pytest.fixture(scope="module")
def encoder() -> ImageEncoder:
    return ImageEncoder(PROCESSOR, max_pixels=2**26)


def stock(data: list[bytes], **settings: int) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    """Pixel values and grids of the stock processor."""
    processor = Qwen2VLImageProcessorPil.from_pretrained(PROCESSOR, **settings)
    images = [Image.open(io.BytesIO(item)) for item in data]
    images = [authors_rgb(image) if image.mode == "RGBA" else image.convert("RGB") for image in images]
    output = processor(images, return_tensors="pt")
    return output["pixel_values"], [(h, w) for _, h, w in output["image_grid_thw"].tolist()]


def normalised(patches: np.ndarray, encoder: ImageEncoder) -> torch.Tensor:
    """What the device makes of the bytes: [patches, 3 * 2 * 14 * 14], both frames alike."""
    pixels = torch.from_numpy(patches).double().view(len(patches), 3, 1, -1) / 255
    mean, std = (torch.tensor(values).double().view(1, 3, 1, 1) for values in (encoder.mean, encoder.std))
    return ((pixels - mean) / std).expand(-1, -1, 2, -1).flatten(1)


@pytest.mark.parametrize("size", SIZES)
def test_one_image_is_what_the_stock_processor_makes_of_it(size: tuple[int, int], encoder: ImageEncoder) -> None:
    data = noise_png(size)
    pixel_values, grids = stock([data])
    ((patches, grid),) = encoder([data])
    assert [grid] == grids and encoder.grid(data) == grid
    assert patches.dtype == np.uint8 and patches.shape == (grid[0] * grid[1], 3 * 14 * 14)
    # values up to 2.7 in float32: a few roundings of 2e-7; one grey level would be 0.015
    torch.testing.assert_close(normalised(patches, encoder), pixel_values.double(), atol=1e-6, rtol=0)


def test_several_images_are_cut_apart_in_order(encoder: ImageEncoder) -> None:
    data = [noise_png(size) for size in SIZES]
    for (patches, grid), item in zip(encoder(data), data, strict=True):
        ((alone, grid_alone),) = encoder([item])
        assert grid == grid_alone and np.array_equal(patches, alone)


@pytest.mark.parametrize("mode", ["L", "RGBA"])
def test_grey_and_transparent_images_become_rgb(mode: str, encoder: ImageEncoder) -> None:
    data = noise_png((84, 56), mode)
    ((patches, _),) = encoder([data])
    torch.testing.assert_close(normalised(patches, encoder), stock([data])[0].double(), atol=1e-6, rtol=0)


def test_no_images_give_no_patches(encoder: ImageEncoder) -> None:
    assert encoder([]) == []


def test_images_are_capped_at_max_pixels_as_the_stock_processor_caps_them() -> None:
    limit = 20 * 28 * 28
    capped = ImageEncoder(PROCESSOR, max_pixels=limit)
    data = noise_png((700, 300))
    (height, width) = capped.grid(data)
    assert height * width * 14 * 14 <= limit
    pixel_values, grids = stock([data], max_pixels=limit)
    ((patches, grid),) = capped([data])
    assert [grid] == grids
    torch.testing.assert_close(normalised(patches, capped), pixel_values.double(), atol=1e-6, rtol=0)


def test_the_processors_own_limit_holds_below_a_larger_cap(encoder: ImageEncoder) -> None:
    height, width = encoder.grid(noise_png((1500, 900)))
    assert height * width * 14 * 14 <= 802816


def test_a_blank_image_keeps_its_grid_and_loses_its_content(encoder: ImageEncoder) -> None:
    blank = ImageEncoder(PROCESSOR, max_pixels=2**26, blank=True)
    data = [noise_png((100, 61)), image_bytes(3, size=(60, 90))]
    for (patches, grid), (seen, seen_grid) in zip(blank(data), encoder(data), strict=True):
        assert grid == seen_grid and patches.shape == seen.shape
        assert (patches == 128).all()


def test_a_cut_off_image_is_refused_when_only_its_grid_is_wanted(encoder: ImageEncoder) -> None:
    """Packing measures samples by their grids; a damaged file must not get into a shard."""
    with pytest.raises(SampleError, match="not a readable"):
        encoder.grid(noise_png((112, 84))[:-2000])


def test_a_stripe_is_refused(encoder: ImageEncoder) -> None:
    with pytest.raises(SampleError, match="aspect ratio"):
        encoder([image_bytes(size=(4000, 10))])


def test_a_folder_without_an_image_processor_is_a_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no image processor at"):
        ImageEncoder(str(tmp_path), max_pixels=2**20)


def processor_folder(folder: Path, **settings: object) -> str:
    """The golden processor with other settings; None takes one away."""
    content = json.loads((Path(PROCESSOR) / "preprocessor_config.json").read_text()) | settings
    content = {key: value for key, value in content.items() if value is not None}
    (folder / "preprocessor_config.json").write_text(json.dumps(content))
    return str(folder)


LIMITS = {
    "top level": {"min_pixels": 6272, "max_pixels": 50176, "size": None},
    "edges": {"size": {"shortest_edge": 6272, "longest_edge": 50176}},
    "size": {"size": {"min_pixels": 6272, "max_pixels": 50176}},
    "both": {"min_pixels": 6272, "max_pixels": 50176, "size": {"min_pixels": 1, "max_pixels": 2}},
}


@pytest.mark.parametrize("spelling", LIMITS)
def test_limits_are_read_in_every_spelling(spelling: str, tmp_path: Path) -> None:
    path = processor_folder(tmp_path, **{"min_pixels": None, "max_pixels": None, **LIMITS[spelling]})
    encoder = ImageEncoder(path, max_pixels=2**26)
    assert (encoder.min_pixels, encoder.max_pixels) == (6272, 50176)
    height, width = encoder.grid(noise_png((600, 600)))
    assert height * width * 14 * 14 <= 50176


def test_a_size_without_both_limits_is_a_users_mistake(tmp_path: Path) -> None:
    path = processor_folder(tmp_path, min_pixels=None, max_pixels=None, size={"height": 448, "width": 448})
    with pytest.raises(UserError, match=r"has size .*448.*; expected min_pixels and max_pixels"):
        ImageEncoder(path, max_pixels=2**26)


def test_a_minimum_above_the_runs_limit_is_refused(tmp_path: Path) -> None:
    """It would win: every small image would be larger than the recipe allows."""
    path = processor_folder(tmp_path, min_pixels=200_704)
    with pytest.raises(UserError, match=r"data\.max_image_pixels: at most 50176 pixels, but .* smaller than 200704"):
        ImageEncoder(path, max_pixels=50_176)
    assert ImageEncoder(path, max_pixels=200_704).max_pixels == 200_704


GRIDS = {
    "one window": [(8, 8)],
    "a cell": [(2, 2)],
    "whole windows": [(16, 24)],
    "cut windows on both sides": [(10, 18)],
    "several sizes": [(4, 16), (10, 18), (2, 2), (36, 34), (10, 18)],
}


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("layout", [LAYOUT, VisionLayout(14, 2, 56), VisionLayout(16, 4, 128)], ids=str)
def test_bookkeeping_of_several_images_is_transformers_own(name: str, layout: VisionLayout) -> None:
    grids = [(h * layout.merge_size // 2, w * layout.merge_size // 2) for h, w in GRIDS[name]]
    thw = torch.tensor([(1, *grid) for grid in grids])
    window_index, cu_window_seqlens = get_vision_window_index(
        thw, layout.merge_size, layout.window_size, layout.patch_size
    )
    wanted = {
        "position_ids": get_vision_position_ids(thw, layout.merge_size),
        "window_index": window_index,
        "cu_seqlens": get_vision_cu_seqlens(thw),
        "cu_window_seqlens": cu_window_seqlens,
    }
    actual = attention_bookkeeping(grids, layout)
    assert actual.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert actual[key].tolist() == tensor.tolist(), key
    assert {key: tensor.dtype for key, tensor in actual.items()} == {
        "position_ids": torch.int64,
        "window_index": torch.int64,
        "cu_seqlens": torch.int32,
        "cu_window_seqlens": torch.int32,
    }
