"""LoRA adapters: what they compute is what PEFT computes, values and gradients, whatever is checkpointed."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from ilvr_ds.errors import UserError
from ilvr_ds.model.layers.adapters import add_adapters
from ilvr_ds.model.student import load_student, prepare_student
from tests.golden_set import GoldenSet

TARGETS = ("q_proj", "o_proj", "gate_proj", "down_proj")
"""With a bias and without, wider and narrower outputs than inputs."""


def adapted(golden: GoldenSet, dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    """The student with adapters that do something, the same ones each time: fresh ones multiply by zero."""
    model_settings = replace(golden.model, lora_rank=4, lora_alpha=12, lora_targets=TARGETS, **settings)
    model = load_student(model_settings, dtype, 0)
    prepare_student(model, model_settings)
    draw = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if ".lora_" in name:
            nn.init.normal_(weight.data, std=0.1, generator=draw)
    return model.to(dtype).model.language_model


def with_pefts_own_forward(language_model: Any) -> Any:
    plain = copy.deepcopy(language_model)
    for module in plain.modules():
        module.__dict__.pop("forward", None)
    return plain


def states_and_gradients(language_model: Any, golden: GoldenSet) -> list[torch.Tensor]:
    ids = torch.from_numpy(golden.encoded[5].input_ids)[None]
    states = language_model(input_ids=ids, use_cache=False).last_hidden_state
    (states * torch.linspace(-1, 1, states.numel()).view_as(states)).sum().backward()
    gradients = [p.grad for p in language_model.parameters() if p.requires_grad]
    assert len(gradients) == 2 * len(TARGETS) * len(language_model.layers)
    return [states, *gradients]


@pytest.mark.parametrize("checkpointing", ["none", "full", "selective"])
def test_it_is_pefts_sum(golden: GoldenSet, checkpointing: str) -> None:
    """In float64 to its rounding: catches a scale that is missing or applied twice, and a sum in place over what the
    backward or a checkpoint needs."""
    ours = adapted(golden, activation_checkpointing=checkpointing)
    plain = with_pefts_own_forward(adapted(golden, activation_checkpointing="none"))
    pairs = zip(states_and_gradients(ours, golden), states_and_gradients(plain, golden), strict=True)
    for got, wanted in pairs:
        assert float((got - wanted).detach().norm() / wanted.detach().norm()) < 1e-12


def test_all_layers_but_the_last_compute_so(golden: GoldenSet) -> None:
    """The teacher calls the last layer's parts one by one: there ZeRO-3 gathers the weights of a module that is called
    and of no other. A PEFT that no longer has this class would leave all layers to it."""
    layers = adapted(golden).layers
    ours = [sum("forward" in module.__dict__ for module in layer.modules()) for layer in layers]
    moved = "PEFT's layers are no longer those whose forward model/layers/adapters.py replaces"
    assert ours == [len(TARGETS)] * (len(layers) - 1) + [0], moved


def test_a_copy_computes_with_its_own_weights(golden: GoldenSet) -> None:
    ours = adapted(golden)
    other = copy.deepcopy(ours)
    for weight in other.parameters():
        weight.data.zero_()
    ids = torch.from_numpy(golden.encoded[5].input_ids)[None]
    with torch.no_grad():
        assert float(other(input_ids=ids).last_hidden_state.abs().max()) == 0
        assert float(ours(input_ids=ids).last_hidden_state.abs().max()) > 0


def test_bf16_is_as_near_as_pefts(golden: GoldenSet) -> None:
    """PEFT rounds B's product before it adds; the sum within the product is not further than that from what the same
    weights give in float64."""
    ours = adapted(golden, torch.bfloat16)
    plain = with_pefts_own_forward(ours)
    ids = torch.from_numpy(golden.encoded[5].input_ids)[None]
    with torch.no_grad():
        exact = copy.deepcopy(plain).double()(input_ids=ids).last_hidden_state
        errors = [float((m(input_ids=ids).last_hidden_state.double() - exact).norm()) for m in (ours, plain)]
    assert errors[0] < 1.1 * errors[1]


def test_fresh_adapters_change_nothing(golden: GoldenSet, stock: Any) -> None:
    ids = torch.from_numpy(golden.encoded[5].input_ids)[None]
    language_model = load_student(golden.model, torch.float32, 0).model.language_model
    add_adapters(language_model, replace(golden.model, lora_rank=4))
    with torch.no_grad():
        states = language_model(input_ids=ids).last_hidden_state
        assert torch.equal(states, stock.model.language_model(input_ids=ids).last_hidden_state)


def test_unknown_targets_name_the_key(golden: GoldenSet) -> None:
    settings = replace(golden.model, lora_rank=4, lora_targets=("no_such_proj",))
    with pytest.raises(UserError, match=r"^model\.lora_targets: .*no_such_proj"):
        add_adapters(load_student(settings, torch.float32, 0).model.language_model, settings)


def test_no_tokens_are_no_mistake(golden: GoldenSet) -> None:
    """A rank without samples calls the model all the same."""
    layer = adapted(golden).layers[0].self_attn
    width = layer.q_proj.in_features
    assert layer.q_proj(torch.zeros(1, 0, width, dtype=torch.float64)).shape == (1, 0, layer.q_proj.out_features)
