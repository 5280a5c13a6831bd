"""The rollout equals a recompute of the whole prefix for each latent slot, in float64, and keeps what it says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ilvr_ds.data.window import MicroBatch, RolloutLayout
from ilvr_ds.distill.stage2 import StageTwo
from ilvr_ds.model.injection import write_images
from ilvr_ds.model.student import load_student
from tests.golden_set import GoldenSet, golden_set
from tests.model.recompute import recompute

MIXED = [5, 0, 2, 4]
"""Samples with 0, 3, 1 and 2 segments (of the stored set), with lengths from 82 to 647 tokens."""


@pytest.fixture(scope="module")
def golden() -> GoldenSet:
    return golden_set()


def model_of(golden: GoldenSet) -> Any:
    """The golden model in float64, its norms too: the stock ones round to float32 inside."""
    model = load_student(golden.model, torch.float64, len(golden.encoder.tokenizer))
    for module in list(model.model.language_model.modules()):
        for name, norm in module.named_children():
            if type(norm).__name__.endswith("RMSNorm"):
                exact = torch.nn.RMSNorm(norm.weight.shape, norm.variance_epsilon, dtype=torch.float64)
                exact.load_state_dict(norm.state_dict())
                setattr(module, name, exact)
    return model


def features_of(micro: MicroBatch, model: Any) -> Tensor:
    rows = int(micro.tokens.image_rows.max()) + 1
    return torch.randn(rows, model.config.text_config.hidden_size, generator=torch.Generator().manual_seed(0)).double()


def layout_of(micro: MicroBatch) -> RolloutLayout:
    assert micro.rollout is not None
    return micro.rollout


def ce_and_grads(model: Any, hidden: Tensor, micro: MicroBatch) -> tuple[float, dict[str, Tensor]]:
    logits = model.lm_head(hidden.flatten(0, 1)[micro.label_rows])
    loss = torch.nn.functional.cross_entropy(logits, micro.label_ids, reduction="sum")
    model.zero_grad()
    loss.backward()
    return float(loss.detach()), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("indices", [MIXED, [3], [5]], ids=["0, 3, 1 and 2 segments", "4 segments", "no segment"])
def test_equals_recomputing_every_prefix(golden: GoldenSet, indices: list[int], side: str) -> None:
    """Loss and all gradients; catches wrong masks, positions, feedback columns, and gradients that are cut."""
    model = model_of(golden)
    micro = golden.free_window(indices, len(indices), side).micro_batches[0]
    features = features_of(micro, model)
    language_model = model.model.language_model
    embeddings = write_images(language_model.embed_tokens(micro.tokens.input_ids), micro.tokens, features)
    marked = golden.window(indices, len(indices), side).micro_batches[0]  # where a stage-1 batch has its latents
    plain = recompute(language_model, embeddings, micro.tokens, marked.latent_slots, marked.sample_of_segment)
    expected, expected_grads = ce_and_grads(model, plain, micro)
    stage = StageTwo(model, golden.settings["latent_size"], activation_checkpointing=False)
    hidden = stage.hidden(micro, features)
    real = micro.tokens.real
    assert float((hidden[real] - plain[real]).detach().abs().max()) < 1e-10
    actual, grads = ce_and_grads(model, hidden, micro)
    assert actual == pytest.approx(expected, rel=1e-12)
    assert set(grads) == set(expected_grads)
    for name, grad in grads.items():
        assert float((grad - expected_grads[name]).norm() / expected_grads[name].norm()) < 1e-8, name
