from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from ilvr_ds.config import ModelConfig
from ilvr_ds.model.layers.checkpointing import checkpoint_arguments
from ilvr_ds.model.layers.four_bit import pack_layers
from ilvr_ds.model.student import build_text_model, load_config, load_student, prepare_student
from ilvr_ds.planning.geometry import geometry_of
from ilvr_ds.planning.memory import activation_bytes
from tests.golden_set import golden_set
from tests.model.test_rollout import Live


def language_model(kind: str, lora_rank: int = 0, lora_base: str = "full") -> Any:
    golden = golden_set()
    settings = ModelConfig(path=golden.model.path, attention="sdpa", activation_checkpointing=kind, lora_rank=lora_rank)  # type: ignore[arg-type]
    torch.manual_seed(0)
    model = load_student(settings, torch.float32, len(golden.encoder.tokenizer))
    if lora_base != "full":
        pack_layers(model.model.language_model, lambda _: nullcontext(), torch.device("cpu"))
    prepare_student(model, settings)
    return model.model.language_model


def forward(model: Any) -> Tensor:
    ids = torch.arange(60).view(2, 30)
    hidden: Tensor = model(input_ids=ids, use_cache=False).last_hidden_state
    return hidden.square().sum()


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_gradients_are_the_same(lora_rank: int) -> None:
    results = []
    for kind in ("none", "full", "selective"):
        model = language_model(kind, lora_rank)
        model.get_input_embeddings().weight.requires_grad_(True)
        forward(model).backward()
        results.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert len(results[0]) > 10
    for other in results[1:]:
        assert other.keys() == results[0].keys()
        assert all(torch.equal(other[name], gradient) for name, gradient in results[0].items())


def test_selective_computes_no_matrix_product_again() -> None:
    products = {}
    for kind in ("none", "full", "selective"):
        model = language_model(kind)
        with FlopCounterMode(display=False) as counter:
            forward(model).backward()
        products[kind] = counter.get_total_flops()
    # full computes a layer again up to its last product, whose result the backward does not need
    last = sum(2 * 60 * layer.mlp.down_proj.weight.numel() for layer in model.layers)
    assert products["selective"] == products["none"]
    assert products["full"] == pytest.approx(products["none"] * 4 / 3 - last, rel=0.01)


class Products(TorchDispatchMode):
    """Counts products of layers in 4 bits."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += str(function).startswith("bitsandbytes.gemm")
        return function(*args, **(kwargs or {}))


def test_nor_one_of_layers_in_4_bits() -> None:
    """Catches an operator of bitsandbytes that the policy does not know: selective would cost what full costs."""
    counts = {}
    for kind in ("none", "full", "selective"):
        model = language_model(kind, lora_rank=4, lora_base="nf4")
        with Products() as products:
            forward(model).backward()
        counts[kind] = products.count
    assert counts["selective"] == counts["none"] == 7 * len(model.layers)
    assert counts["full"] == 2 * counts["none"]


def test_nor_flash_attns_attention() -> None:
    """Catches a policy that knows PyTorch's operators alone; the package itself needs a GPU, so it is stood in for."""
    calls = 0

    @torch.library.custom_op("flash_attn_for_tests::_flash_attn_varlen_forward", mutates_args=())
    def attend(query: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return query.clone()

    attend.register_autograd(lambda _, gradient: gradient)
    state = torch.randn(3, requires_grad=True)
    checkpoint(lambda x: attend(x.sin()).cos(), state, **checkpoint_arguments("selective")).sum().backward()
    assert calls == 1 and state.grad is not None


@pytest.mark.parametrize("kind", ["none", "full", "selective"])
def test_what_lives_until_the_backward_is_what_the_plan_counts(kind: str) -> None:
    """In bf16, for each token and layer: the formula of planning/memory.py."""
    assert_lives_what_the_plan_counts(golden_set().model.path, kind, 2)


def assert_lives_what_the_plan_counts(path: str, kind: str, least: int, prepare: Any = lambda model: {}) -> None:
    """With stock kernels, from `least` layers and four more; `prepare` gives what the model is called with besides."""
    T, alive = 256, []
    for layers in (least, least + 4):
        config = load_config(path).text_config
        config.num_hidden_layers, config.layer_types = layers, ["full_attention"] * layers
        model = build_text_model(config, "sdpa").to(torch.bfloat16).train()
        if kind != "none":
            model.gradient_checkpointing_enable(checkpoint_arguments(kind))  # type: ignore[arg-type]
        ids, more = torch.arange(T)[None] % config.vocab_size, prepare(model)
        with Live() as memory:
            hidden = model(input_ids=ids, use_cache=False, **more).last_hidden_state
        alive.append(memory.bytes)
        del hidden
    geometry = geometry_of(load_config(path))
    measured = ((alive[1] - alive[0]) / 4 - 2 * geometry.text.layer_matrices) / T  # views of weights count as made here
    setup: Any = SimpleNamespace(geometry=geometry, itemsize=2, checkpointing=kind, has_fused_layers=False)
    assert measured == pytest.approx(activation_bytes(setup)[0], rel=0.02)
