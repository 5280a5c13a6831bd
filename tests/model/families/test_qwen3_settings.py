"""Settings of training on a tiny random Qwen3-VL: adapters, a base in 4 bits, activation checkpointing, what a plan
counts, an export of adapters."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText

from ilvr_ds.model.layers.four_bit import pack_layers, round_trip
from ilvr_ds.model.student import load_student, prepare_student
from tests.evaluation.exporting import export_base
from tests.model.families.test_qwen3_vl import CPU, states
from tests.model.layers.test_checkpointing import assert_lives_what_the_plan_counts
from tests.qwen3_set import Qwen3Set, qwen3_set, with_latent_tokens

SOME = [0, 3, 7]
"""With images, and one without."""


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Qwen3Set:
    return qwen3_set(tmp_path_factory.mktemp("settings") / "model")


def results(golden: Qwen3Set, model: Any) -> dict[str, Tensor]:
    """States of some samples, and what the sum of their squares has for gradients."""
    window = golden.window(SOME, len(SOME), "right")
    rows = int(window.tokens.image_rows.max()) + 1
    features = torch.randn(rows, 3 * 64, generator=torch.Generator().manual_seed(0))
    hidden = states(model, window.micro_batches[0], features)
    hidden.square().sum().backward()
    return {"": hidden.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_checkpointing_changes_nothing(golden: Qwen3Set, lora_rank: int) -> None:
    """Catches what is added behind a layer that is computed again, twice or not at all."""
    found = []
    for kind in ("none", "full", "selective"):
        torch.manual_seed(0)
        settings: Any = replace(golden.model, activation_checkpointing=kind, lora_rank=lora_rank)
        model = load_student(settings, torch.float32, 0)
        prepare_student(model, settings)
        for name, weight in model.named_parameters():
            if "lora_B" in name:  # zero at first, and then so is the gradient of the other half
                torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(len(name)))
        found.append(results(golden, model))
    assert len(found[0]) > 10
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        assert all(torch.equal(other[name], wanted) for name, wanted in found[0].items())


def test_a_base_in_4_bits_computes_with_its_rounded_weights(golden: Qwen3Set) -> None:
    """Under adapters. Catches norms of queries and keys that are packed too, and layers that are left out."""
    settings = replace(golden.model, lora_rank=4)
    found = []
    for is_packed in (False, True):
        torch.manual_seed(0)
        model = load_student(settings, torch.float32, 0)
        layers = model.model.language_model.layers
        if is_packed:
            pack_layers(model.model.language_model, lambda _: nullcontext(), CPU)
        else:
            with torch.no_grad():
                for name, weight in layers.named_parameters():
                    if weight.dim() == 2:
                        weight.copy_(round_trip(weight)) if "norm" not in name else None
        prepare_student(model, settings)
        found.append(results(golden, model))
    assert found[0].keys() == found[1].keys() and all(name == "" or ".lora_" in name for name in found[0])
    for name, wanted in found[0].items():
        assert (found[1][name] - wanted).norm() <= 1e-5 * wanted.norm(), name


def test_adapters_are_exported_merged_and_apart(
    golden: Qwen3Set, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both load in stock libraries and say the same, with images."""
    from peft import AutoPeftModel

    base, lora = with_latent_tokens(golden, tmp_path / "base"), ("model.lora_rank=4",)
    merged = export_base(base, tmp_path / "merged", monkeypatch, *lora, random=True)
    export_base(base, tmp_path / "apart", monkeypatch, *lora, adapters="apart", random=True)
    together = AutoPeftModel.from_pretrained(tmp_path / "apart/adapter", dtype=torch.float32).eval()
    whole = AutoModelForImageTextToText.from_pretrained(merged, dtype=torch.float32).eval()
    plain = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32).eval()
    from tests.model.families.test_qwen3_vl import stock_inputs

    inputs = stock_inputs(golden, 1)
    with torch.no_grad():
        logits = whole(**inputs).logits
        torch.testing.assert_close(together(**inputs).logits, logits, atol=1e-5, rtol=1e-5)
        assert (plain(**inputs).logits - logits).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["none", "full", "selective"])
def test_what_lives_until_the_backward_is_what_the_plan_counts(golden: Qwen3Set, kind: str) -> None:
    """In bf16, for each token and layer, with stock kernels; what is added at images adds nothing to it."""
    added = [torch.randn(100, 64).bfloat16(), torch.randn(100, 64).bfloat16()]

    def prepare(model: Any) -> dict[str, Any]:
        model._deepstack_process = lambda hidden, slots, rows: hidden.flatten(0, 1).index_add(0, slots, rows)[None]
        return {"visual_pos_masks": torch.arange(100), "deepstack_visual_embeds": added}

    assert_lives_what_the_plan_counts(str(golden.weights), kind, 3, prepare)
