"""The tower on bytes against the stock tower on the stock processor's pixel values."""

from __future__ import annotations

import copy
import io
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from ilvr_ds.data.images import attention_bookkeeping
from ilvr_ds.data.window import ImageBatch
from ilvr_ds.model.student import vision_layout
from ilvr_ds.model.vision import VisionTower
from tests.data.packing import noise_png
from tests.golden_set import GoldenSet

SIZES = [(112, 112), (100, 61), (500, 320), (300, 60)]
"""Width x height: one window, resized, cut windows on both sides, a stripe."""


@pytest.fixture(scope="module")
def batch_of(golden: GoldenSet, stock: Any) -> Any:
    layout = vision_layout(stock.config)

    def build(sizes: list[tuple[int, int]]) -> ImageBatch:
        encoded = golden.encoder.images([noise_png(size) for size in sizes])
        patches = torch.from_numpy(np.concatenate([patches for patches, _ in encoded]))
        return ImageBatch(patches, **attention_bookkeeping([grid for _, grid in encoded], layout))

    return build


def stock_features(golden: GoldenSet, stock: Any, sizes: list[tuple[int, int]]) -> list[torch.Tensor]:
    processor = Qwen2VLImageProcessorPil.from_pretrained(golden.folder / "processor")
    images = [Image.open(io.BytesIO(noise_png(size))) for size in sizes]
    inputs = processor(images, return_tensors="pt")
    with torch.no_grad():
        return list(stock.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output)


def close(actual: torch.Tensor, wanted: torch.Tensor) -> None:
    """float32 through three blocks: some tens of roundings of 6e-8, relative to the largest value."""
    assert actual.shape == wanted.shape
    assert (actual - wanted).abs().max() < 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_features_of_an_image_are_the_stock_models(
    size: tuple[int, int], golden: GoldenSet, stock: Any, tower: VisionTower, batch_of: Any
) -> None:
    close(tower(batch_of([size])), torch.cat(stock_features(golden, stock, [size])))


def test_images_of_several_sizes_do_not_see_each_other(
    golden: GoldenSet, stock: Any, tower: VisionTower, batch_of: Any
) -> None:
    """Together they give what each gives alone, and what the stock model gives for them together."""
    together = tower(batch_of(SIZES))
    close(together, torch.cat([tower(batch_of([size])) for size in SIZES]))
    close(together, torch.cat(stock_features(golden, stock, SIZES)))


def test_a_window_is_what_the_tower_takes(golden: GoldenSet, stock: Any, tower: VisionTower) -> None:
    """Images as the collator lays them out: inputs before helpers, over several samples."""
    window = golden.window([1, 4], 2)
    processor = Qwen2VLImageProcessorPil.from_pretrained(golden.folder / "processor")
    samples = [golden.samples[1], golden.samples[4]]
    files = [data for s in samples for data in s.input_images] + [data for s in samples for data in s.helper_images]
    inputs = processor([Image.open(io.BytesIO(data)).convert("RGB") for data in files], return_tensors="pt")
    with torch.no_grad():
        wanted = stock.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
    close(tower(window.images[0]), torch.cat(list(wanted)))


def test_no_gradient_flows_through_the_tower(tower: VisionTower, batch_of: Any) -> None:
    features = tower(batch_of([SIZES[0]]))
    assert not features.requires_grad
    assert not any(parameter.requires_grad for parameter in tower.parameters())
    assert not any(module.training for module in tower.tower.modules())


def test_a_tower_in_bf16_gives_bf16_features(tower: VisionTower, batch_of: Any) -> None:
    """Weights alone are rounded, 2^-9 relative each, and the normalisation stays float32: a few per cent in all."""
    short = VisionTower(copy.deepcopy(tower.tower).bfloat16(), *(v.flatten().tolist() for v in (tower.mean, tower.std)))
    features, exact = short(batch_of(SIZES[:2])), tower(batch_of(SIZES[:2]))
    assert features.dtype == torch.bfloat16
    assert (features.float() - exact).norm() < 0.03 * exact.norm()


class Noting(torch.nn.Module):
    """Stands for a tower whose attention takes all windows in one call."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(model_type="qwen2_5_vl", _attn_implementation="flash_attention_2")

    def forward(self, pixels: torch.Tensor, **told: Any) -> Any:
        self.told = told
        return SimpleNamespace(pooler_output=pixels)


@pytest.mark.parametrize("sizes", [SIZES, SIZES[::-1]], ids=["longest third", "longest second"])
def test_flash_attention_is_told_the_longest_image_and_window(sizes: list[tuple[int, int]], batch_of: Any) -> None:
    """Catches the length of the first: flash-attn would leave out what is beyond, without a word."""
    tower, images = Noting(), batch_of(sizes)
    VisionTower(tower, [0.5] * 3, [0.5] * 3)(images)
    for longest, bounds in (("max_seqlen", "cu_seqlens"), ("max_window_seqlen", "cu_window_seqlens")):
        lengths = tower.told[bounds].diff().tolist()
        assert tower.told[longest] == max(lengths)
    assert tower.told["max_seqlen"] > tower.told["cu_seqlens"].diff()[0]
