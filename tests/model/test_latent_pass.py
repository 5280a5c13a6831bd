"""Recorded passes of latent slots: what they give over several micro-batches, and what they refuse.

That they equal recomputing every prefix stands in test_rollout.py.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ilvr_ds.config import LossConfig
from ilvr_ds.data.window import MicroBatch
from ilvr_ds.distill.stage2 import StageTwo
from ilvr_ds.model import latent_pass
from ilvr_ds.model.latent_pass import SHAPES, LatentPasses
from ilvr_ds.model.layers.four_bit import pack_layers
from ilvr_ds.model.layers.fused import use_fused_kernels
from ilvr_ds.model.student import load_student, prepare_student
from tests.golden_set import GoldenSet, golden_set
from tests.model.test_rollout import ce_and_grads, features_of, model_of

GPU = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))
ORDER = ([3], [5, 0, 2, 4], [3], [1, 0, 2, 4])
"""Samples of the micro-batches: two shapes, each again after the other, the second with other layouts."""


@pytest.fixture(scope="module")
def golden() -> GoldenSet:
    return golden_set()


def stage_of(model: Any, golden: GoldenSet, is_recorded: bool, checkpointing: bool = False) -> StageTwo:
    return StageTwo(model, LossConfig(), 0, golden.settings["latent_size"], "full", checkpointing, is_recorded)


def run(stage: StageTwo, micro: MicroBatch, features: Tensor) -> tuple[float, dict[str, Tensor]]:
    return ce_and_grads(stage.model, stage.hidden(micro, features), micro)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("device", ["cpu", GPU])
def test_equals_calling_the_layers_over_micro_batches_and_steps(
    golden: GoldenSet, device: str, checkpointing: bool
) -> None:
    """In turn other shapes, a pass without gradients between them, and weights that move in place after each.

    Catches what is left from the micro-batch before (sums, keys, masks), a recording that keeps old weights or is
    replayed for another shape, and an order on the device that is not the program's.
    """
    called = model_of(golden).to(device).train()
    recorded = copy.deepcopy(called)
    stages = [stage_of(called, golden, False, checkpointing), stage_of(recorded, golden, True, checkpointing)]
    for indices in ORDER:
        micro = golden.free_window(indices, len(indices), "right").micro_batches[0].to(torch.device(device))
        features = features_of(micro, called).to(device)
        with torch.no_grad():
            stages[1].hidden(micro, features)
        (loss, grads), (again, others) = (run(stage, micro, features) for stage in stages)
        assert again == pytest.approx(loss, rel=1e-11)
        for name, grad in grads.items():
            assert float((grad - others[name]).norm() / grad.norm()) < 1e-9, (indices, name)
        for stage in stages:
            with torch.no_grad():
                for weight in stage.model.parameters():
                    if weight.grad is not None:
                        weight -= 1e-3 * weight.grad / weight.grad.norm()


@pytest.mark.parametrize("base", ["full", "nf4"])
@pytest.mark.parametrize("device", ["cpu", GPU])
def test_in_16_bit_with_fused_kernels_it_is_the_same_to_rounding(golden: GoldenSet, device: str, base: str) -> None:
    """As it runs: bf16, on a GPU with the fused kernels, and with adapters on a base in 4 bits.

    Two ways to add up in bf16 differ by its rounding (2^-8), which the layers and slots behind pass on.
    """
    results = []
    for is_recorded in (False, True):
        torch.manual_seed(0)
        model = load_student(golden.model, torch.bfloat16, len(golden.encoder.tokenizer)).to(device)
        language_model = model.model.language_model
        if base == "nf4":
            pack_layers(language_model, lambda _: nullcontext(), torch.device(device))
            prepare_student(model, replace(golden.model, lora_rank=4))
            model.to(device, torch.bfloat16)
        use_fused_kernels(language_model, "auto", torch.device(device), torch.bfloat16)
        micro = golden.free_window([5, 0, 2, 4], 4, "right").micro_batches[0].to(torch.device(device))
        features = features_of(micro, model).to(device, torch.bfloat16)
        stage = stage_of(model, golden, is_recorded, checkpointing=True).train()
        run(stage, micro, features)
        results.append(run(stage, micro, features))
    (loss, grads), (again, others) = results
    assert again == pytest.approx(loss, rel=0.02)
    assert grads.keys() == others.keys()
    whole = [torch.cat([one[name].float().flatten() for name in grads]) for one in (grads, others)]
    assert float((whole[0] - whole[1]).norm() / whole[0].norm()) < 0.05


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_weights_that_were_put_elsewhere_are_recorded_anew(golden: GoldenSet, device: str) -> None:
    """Catches replaying on memory that the weights have left, as when an engine lays them out anew."""
    model = model_of(golden).to(device)
    micro = golden.free_window([3], 1, "right").micro_batches[0].to(torch.device(device))
    stage, features = stage_of(model, golden, True), features_of(micro, model).to(device)
    run(stage, micro, features)
    passes = stage.latent_passes
    assert passes is not None
    before = list(passes._shapes.values())
    for weight in model.parameters():
        weight.data = weight.data * 1.01
    moved, grads = run(stage, micro, features)
    wanted, wanted_grads = run(stage_of(model, golden, False), micro, features)
    assert moved == pytest.approx(wanted, rel=1e-12)
    assert all(float((grads[n] - g).norm() / g.norm()) < 1e-9 for n, g in wanted_grads.items())
    assert before[0] not in passes._shapes.values()


def test_adapters_alone_are_trained(golden: GoldenSet) -> None:
    """With LoRA the sums hold the adapters' gradients, and no others."""
    model = model_of(golden)
    prepare_student(model, replace(golden.model, lora_rank=4))
    model.double()
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight.data, std=0.1, generator=torch.Generator().manual_seed(0))
    micro = golden.free_window([5, 0, 2, 4], 4, "right").micro_batches[0]
    features = features_of(micro, model)
    loss, grads = run(stage_of(model, golden, False), micro, features)
    again, others = run(stage_of(model, golden, True), micro, features)
    assert again == pytest.approx(loss, rel=1e-12)
    assert set(others) == set(grads)
    assert all("lora" in name for name in grads)
    for name, grad in grads.items():
        assert float((grad - others[name]).norm() / grad.norm()) < 1e-9, name


@pytest.mark.parametrize("what", ["another micro-batch", "itself"])
def test_a_backward_after_the_memory_was_used_again_is_refused(golden: GoldenSet, what: str) -> None:
    """Two forwards before a backward, or a backward twice, would give gradients that are wrong without an error."""
    model = model_of(golden)
    micro = golden.free_window([3], 1, "right").micro_batches[0]
    stage, features = stage_of(model, golden, True), features_of(micro, model)
    first = stage.hidden(micro, features).sum()
    if what == "itself":
        first.backward(retain_graph=True)
    else:
        stage.hidden(micro, features)
    with pytest.raises(RuntimeError, match="has been used for another micro-batch"):
        first.backward()


def test_recordings_are_bounded(golden: GoldenSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths differ from batch to batch; a recording for each would fill a GPU in the course of a run."""
    monkeypatch.setattr(latent_pass, "GRAIN", 1)
    model = model_of(golden)
    stage = stage_of(model, golden, True)
    passes = stage.latent_passes
    assert passes is not None
    for columns in range(2 * SHAPES, 1, -1):  # the longest first: a larger one takes memory anew
        for length in (columns, 1):
            positions = torch.zeros(1, length, 16, dtype=torch.float64)
            passes.begin((positions, positions), torch.ones(1, length, dtype=torch.bool))
    assert sorted(passes._shapes) == [(1, length) for length in range(1, SHAPES + 1)]


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_in_16_bit_passes_are_added_up_in_float32(golden: GoldenSet, device: str) -> None:
    """Gradients of 24 passes, against each pass's own added up in float64; in bf16 the sum is off by half a percent."""
    slots, rows = 24, 2
    torch.manual_seed(0)
    model = load_student(golden.model, torch.bfloat16, len(golden.encoder.tokenizer)).to(device)
    hidden, grads = torch.randn(2, slots, rows, 1, model.config.text_config.hidden_size).to(device, torch.bfloat16)
    positions = torch.rand(2, rows, slots, 16).to(device, torch.bfloat16)
    real = torch.ones(rows, slots, dtype=torch.bool, device=device)

    def summed(in_fp32: bool, one_by_one: bool) -> list[Tensor]:
        passes = LatentPasses(model.model.language_model, in_fp32)
        recorded = passes.begin((positions[0], positions[1]), real)
        for column in range(slots):
            recorded.forward(hidden[column], column)
        totals = [torch.zeros_like(weight, dtype=torch.float64) for weight in passes.weights]
        for column in reversed(range(slots)):
            recorded.backward(hidden[column], column, grads[column])
            if one_by_one or column == 0:
                torch._foreach_add_(totals, [total.double() for total in passes.sums])
                torch._foreach_zero_(passes.sums)
        return totals

    stage_of(model, golden, False)  # takes the layers' attention to keys and values that are kept
    expected = summed(True, one_by_one=True)
    for in_fp32, least, most in ((True, 0.0, 1e-5), (False, 1e-3, 0.1)):
        found = summed(in_fp32, one_by_one=False)
        worst = max(float((f - e).norm() / e.norm()) for f, e in zip(found, expected, strict=True) if e.norm())
        assert least <= worst < most
