"""Recorded passes of latent slots: what they give over several micro-batches, and what they refuse.

That they equal recomputing every prefix stands in test_rollout.py.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from ilvr_ds.data.window import MicroBatch
from ilvr_ds.distill.stage2 import StageTwo
from ilvr_ds.model.student import add_adapters
from tests.golden_set import GoldenSet, golden_set
from tests.model.test_rollout import ce_and_grads, features_of, model_of

GPU = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))
ORDER = ([3], [5, 0, 2, 4], [3], [1, 0, 2, 4])
"""Samples of the micro-batches: two shapes, each again after the other, the second with other layouts."""


@pytest.fixture(scope="module")
def golden() -> GoldenSet:
    return golden_set()


@pytest.fixture
def exact() -> Iterator[None]:
    """No TF32, so that two ways to compute agree."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def stage_of(model: Any, golden: GoldenSet, is_recorded: bool, checkpointing: bool = False) -> StageTwo:
    return StageTwo(model, golden.settings["latent_size"], checkpointing, 1024, is_recorded)


def run(stage: StageTwo, micro: MicroBatch, features: Tensor) -> tuple[float, dict[str, Tensor]]:
    return ce_and_grads(stage.model, stage.hidden(micro, features), micro)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.usefixtures("exact")
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


def test_weights_that_were_put_elsewhere_are_recorded_anew(golden: GoldenSet) -> None:
    """Catches replaying on memory that the weights have left, as when an engine lays them out anew."""
    model = model_of(golden)
    micro = golden.free_window([3], 1, "right").micro_batches[0]
    stage, features = stage_of(model, golden, True), features_of(micro, model)
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
    settings = golden.model.__class__(path=golden.model.path, lora_rank=4)
    model.requires_grad_(False)
    add_adapters(model.model.language_model, settings)
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
