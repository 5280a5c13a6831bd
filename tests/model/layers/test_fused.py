"""Fused kernels compute what the stock layers compute, forward and backward; on a GPU the real ones."""

from __future__ import annotations

import copy
import sys
from collections import Counter
from types import MethodType, ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as stock
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig, Qwen2_5_VLVisionConfig

from ilvr_ds.errors import UserError
from ilvr_ds.model.layers import fused
from ilvr_ds.model.layers.checkpointing import checkpoint_arguments

GPU = torch.device("cuda")
needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or not fused.has_liger(), reason="needs a GPU and liger-kernel"
)


def text_model(dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    config = Qwen2_5_VLTextConfig(
        vocab_size=50, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, use_cache=False, rope_parameters={"rope_type": "default", "rope_theta": 1e4,
        "mrope_section": [2, 3, 3]},
    )  # fmt: skip
    return stock.Qwen2_5_VLTextModel._from_config(config, attn_implementation="sdpa", dtype=torch.float32).to(dtype)


def tower() -> Any:
    torch.manual_seed(0)
    config = Qwen2_5_VLVisionConfig(
        depth=2, hidden_size=64, intermediate_size=60, num_heads=4, out_hidden_size=32, window_size=56,
        fullatt_block_indexes=[1],
    )  # fmt: skip
    model: Any = stock.Qwen2_5_VisionTransformerPretrainedModel._from_config(config, attn_implementation="sdpa")
    return model.requires_grad_(False)


def test_the_fused_norm_is_the_stock_one() -> None:
    layer = stock.Qwen2_5_VLRMSNorm(32).double()
    layer.weight.data.normal_()
    x = torch.randn(7, 32, dtype=torch.float64)
    wanted = layer(x)
    layer.forward = MethodType(fused._norm, layer)
    torch.testing.assert_close(layer(x), wanted, rtol=1e-6, atol=1e-7)  # the stock one rounds to float32


def test_a_tower_with_wider_layers_gives_the_same_features() -> None:
    network, pixels = tower(), torch.randn(32, 3 * 2 * 14 * 14)
    grid = torch.tensor([[1, 4, 8]])
    wanted = network(pixels, grid).pooler_output
    fused.widen_gated_layers(network)
    assert network.blocks[0].mlp.up_proj.weight.shape[0] == 64
    torch.testing.assert_close(network(pixels, grid).pooler_output, wanted, rtol=1e-5, atol=1e-6)
    before = network.blocks[0].mlp.up_proj.weight
    fused.widen_gated_layers(network)
    assert network.blocks[0].mlp.up_proj.weight.shape == before.shape, "a second time changes nothing"


@pytest.mark.parametrize("wanted", ["auto", "stock"])
def test_on_a_cpu_layers_stay_as_they_are(wanted: str) -> None:
    network = text_model()
    fused.use_fused_kernels(network, wanted, torch.device("cpu"), torch.bfloat16)
    assert fused.kernels_in_words(network) == "transformers' own"


def test_liger_by_name_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "has_liger", lambda: False)
    fused.check_kernels("auto")
    with pytest.raises(UserError, match=r"model\.kernels is liger: needs liger-kernel; pip install"):
        fused.check_kernels("liger")


def count_calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each replacement runs from now on, as if Liger were here; rotations are put back when the test ends."""
    calls: Counter[str] = Counter()

    def count(name: str) -> None:
        real = getattr(fused, name)

        def counted(*arguments: Any) -> Any:
            calls[name] += 1
            return real(*arguments)

        monkeypatch.setattr(fused, name, counted)

    for name in ("_norm", "_gated", "_fused_rotate", "_fused_rotate_vision"):
        count(name)
    for name in ("apply_rotary_pos_emb", "apply_rotary_pos_emb_vision"):
        monkeypatch.setattr(stock, name, getattr(stock, name))
    functional = ModuleType("liger_kernel.transformers.functional")
    functional.liger_swiglu = lambda gate, up: nn.functional.silu(gate) * up  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, functional.__name__, functional)
    monkeypatch.setattr(fused, "has_liger", lambda: True)
    return calls


MOVED = "transformers' layers no longer call what model/layers/fused.py replaces, or call something else beside it"


@torch.no_grad()
def test_a_language_model_calls_every_replacement(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches layers that transformers renames or computes in another way: they would stay stock without a word."""
    network, batch = text_model(torch.float32), torch.randn(3, 10, 64)
    wanted, calls = network(inputs_embeds=batch).last_hidden_state, count_calls(monkeypatch)
    fused.use_fused_kernels(network, "liger", GPU, torch.bfloat16)
    torch.testing.assert_close(network(inputs_embeds=batch).last_hidden_state, wanted, rtol=1e-5, atol=1e-5)
    layers = len(network.layers)
    assert calls == {"_norm": 2 * layers + 1, "_gated": layers, "_fused_rotate": layers}, MOVED


@torch.no_grad()
def test_a_tower_calls_every_replacement(monkeypatch: pytest.MonkeyPatch) -> None:
    network, pixels, grid = tower(), torch.randn(32, 3 * 2 * 14 * 14), torch.tensor([[1, 4, 8]])
    wanted, calls = network(pixels, grid).pooler_output, count_calls(monkeypatch)
    fused.use_fused_kernels(network, "liger", GPU, torch.bfloat16)
    torch.testing.assert_close(network(pixels, grid).pooler_output, wanted, rtol=1e-5, atol=1e-5)
    layers = len(network.blocks)
    assert calls == {"_norm": 2 * layers + 1, "_gated": layers, "_fused_rotate_vision": layers}, MOVED


@needs_gpu
@pytest.mark.parametrize("checkpointing", ["none", "full", "selective"])
def test_a_language_model_has_the_outputs_and_gradients_of_the_stock_one(checkpointing: str) -> None:
    """float64 is the judge: the fused model in bf16 may be as far from it as the stock one in bf16, and a bit."""
    plain = text_model().to(GPU)
    batch = torch.randn(3, 100, 64, device=GPU, dtype=torch.float64)
    found = {}
    for name in ("exact", "stock", "fused"):
        network = copy.deepcopy(plain)
        if name != "exact":
            network = network.to(torch.bfloat16)
        if name == "fused":
            fused.use_fused_kernels(network, "liger", GPU, torch.bfloat16)
            assert fused.kernels_in_words(network) == "fused norms, activations and rotations"
        found[name] = outputs_and_gradients(network, batch.to(network.dtype), checkpointing)
    for exact, bf16, ours in zip(*found.values(), strict=True):
        limit = max(float((bf16.double() - exact).norm()), 1e-3 * float(exact.norm()))
        assert float((ours.double() - exact).norm()) < 1.5 * limit


def outputs_and_gradients(network: Any, batch: Tensor, checkpointing: str) -> list[Tensor]:
    batch = batch.clone().requires_grad_()
    if checkpointing == "none":
        output = network(inputs_embeds=batch).last_hidden_state
    else:
        arguments = checkpoint_arguments(checkpointing)
        output = checkpoint(lambda x: network(inputs_embeds=x).last_hidden_state, batch, **arguments)
    output.float().square().sum().backward()
    assert batch.grad is not None
    return [output.detach(), batch.grad, *(p.grad for n, p in network.named_parameters() if "embed" not in n)]


@needs_gpu
@torch.no_grad()
def test_a_tower_has_the_features_of_the_stock_one() -> None:
    exact, pixels = tower().double().to(GPU), torch.randn(32, 3 * 2 * 14 * 14, device=GPU, dtype=torch.float64)
    grid = torch.tensor([[1, 4, 8]], device=GPU)
    wanted = exact(pixels, grid).pooler_output
    plain, ours = (copy.deepcopy(exact).bfloat16() for _ in range(2))
    fused.use_fused_kernels(ours, "liger", GPU, torch.bfloat16)
    errors = [float((network(pixels.bfloat16(), grid).pooler_output - wanted).norm()) for network in (plain, ours)]
    assert errors[1] < 1.5 * errors[0]
