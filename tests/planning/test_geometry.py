from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from ilvr_ds.config import ModelConfig
from ilvr_ds.model.layers.adapters import add_adapters
from ilvr_ds.model.student import load_config
from ilvr_ds.planning.geometry import KNOWN, geometry_of
from tests.golden_set import golden_set


@pytest.fixture(scope="module")
def golden_config() -> Any:
    return load_config(str(golden_set().folder))


def test_weights_are_counted_as_torch_counts_them(golden_config: Any) -> None:
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(golden_config)
    geometry = geometry_of(golden_config)
    assert geometry.vision.total == sum(p.numel() for p in model.model.visual.parameters())
    assert geometry.text.language_model == sum(p.numel() for p in model.model.language_model.parameters())
    assert geometry.text.total + geometry.vision.total == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("is_tied", [False, True])
def test_weights_of_qwen3_vl_are_counted_as_torch_counts_them(is_tied: bool) -> None:
    text = {
        "vocab_size": 96, "hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    }  # fmt: skip
    vision = {
        "depth": 4, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 40,
        "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 2],
    }  # fmt: skip
    config: Any = Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=is_tied)
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration(config)
    model.tie_weights()
    geometry = geometry_of(config)
    assert geometry.vision.total == sum(p.numel() for p in model.model.visual.parameters())
    assert geometry.text.language_model == sum(p.numel() for p in model.model.language_model.parameters())
    assert geometry.text.total + geometry.vision.total == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("targets", [("q_proj", "down_proj"), ("k_proj", "o_proj", "up_proj")])
def test_adapters_are_counted_as_peft_makes_them(targets: tuple[str, ...], golden_config: Any) -> None:
    with torch.device("meta"):
        language_model = Qwen2_5_VLForConditionalGeneration(golden_config).model.language_model
        add_adapters(language_model, ModelConfig(lora_rank=3, lora_targets=targets))
    adapters = sum(p.numel() for name, p in language_model.named_parameters() if ".lora_" in name)
    assert geometry_of(golden_config).text.adapters(3, targets) == adapters


def test_the_released_models_have_their_published_sizes() -> None:
    """Elements in the safetensors files on the hub."""
    sizes = {name: geometry.text.total + geometry.vision.total for name, geometry in KNOWN.items()}
    assert sizes == {
        "3b": 3_754_622_976,
        "7b": 8_292_166_656,
        "32b": 33_452_718_336,
        "72b": 73_410_777_344,
        "qwen3vl_2b": 2_127_532_032,
        "qwen3vl_4b": 4_437_815_808,
        "qwen3vl_8b": 8_767_123_696,
        "qwen3vl_32b": 33_357_390_064,
    }
