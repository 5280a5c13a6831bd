"""What the cached attention needs of the stock layers; what it computes is tested in tests/model/test_rollout.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ilvr_ds.model.layers.cached_attention import CachedCall, LayerMemory, cached_attention
from ilvr_ds.model.layers.checkpointing import checkpoint_arguments
from ilvr_ds.model.student import load_student
from tests.golden_set import GoldenSet


@pytest.fixture
def language_model(golden: GoldenSet) -> Any:
    model = load_student(golden.model, torch.float32, 0)
    model.gradient_checkpointing_enable(checkpoint_arguments("full"))
    return model.model.language_model.train()


def test_a_stock_layer_hands_its_keys_to_the_call_and_the_call_to_the_attention(language_model: Any) -> None:
    """With activation checkpointing too, under which a layer drops its cache: inside the block it must be off."""
    hidden = torch.randn(2, 3, language_model.config.hidden_size)
    positions = language_model.rotary_emb(hidden, torch.arange(3).expand(3, 2, 3))
    with cached_attention(language_model):
        for layer in language_model.layers:
            call = CachedCall(LayerMemory(columns=3), 0, None)
            layer(hidden, attention_mask=None, position_embeddings=positions, past_key_values=call)
            moved = "transformers' layers no longer use a cache as model/layers/cached_attention.py expects"
            assert call.done is not None and call.keys.shape[:3:2] == (2, 3), moved


def test_a_model_leaves_the_block_as_it_entered(language_model: Any) -> None:
    before = language_model.config._attn_implementation
    with pytest.raises(KeyError), cached_attention(language_model):
        assert language_model.config._attn_implementation != before
        assert not any(layer.gradient_checkpointing for layer in language_model.layers)
        raise KeyError
    assert language_model.config._attn_implementation == before
    assert all(layer.gradient_checkpointing for layer in language_model.layers), (
        "transformers no longer switches checkpointing layer by layer, as model/layers/cached_attention.py does"
    )
