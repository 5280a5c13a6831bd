from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from ilvr_ds.data.images import ImageEncoder
    from ilvr_ds.model.vision import VisionTower
    from tests.golden_set import GoldenSet


@pytest.fixture(scope="session")
def golden() -> GoldenSet:
    """The stored golden set: a random Qwen2.5-VL with tokenizer and samples."""
    from tests.golden_set import DEFAULT, GoldenSet

    return GoldenSet(DEFAULT)


@pytest.fixture(scope="session")
def stock(golden: GoldenSet) -> Any:
    """The stock model, whole, in fp32 and evaluation mode; not to be changed."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    return Qwen2_5_VLForConditionalGeneration.from_pretrained(golden.folder, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def tower(golden: GoldenSet) -> Any:
    """The vision tower of the same weights behind its normalisation."""
    from ilvr_ds.model.student import load_student

    return tower_of(load_student(golden.model, torch.float32, num_tokens=0), golden.encoder.images)


def tower_of(model: Any, images: ImageEncoder) -> VisionTower:
    """Take it out of a model, and put it behind the normalisation of its images."""
    from ilvr_ds.model.student import detach_tower
    from ilvr_ds.model.vision import VisionTower

    return VisionTower(detach_tower(model, lambda parameters: nullcontext()), images.mean, images.std)
