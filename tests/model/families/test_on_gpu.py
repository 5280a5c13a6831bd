"""A family on a GPU: fused kernels and variable-length attention in bf16, recorded latents, nothing that waits."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from ilvr_ds.config import LossConfig
from ilvr_ds.data.window import MicroBatch
from ilvr_ds.distill.query import ContextEncoder
from ilvr_ds.distill.stage2 import StageTwo
from ilvr_ds.model.families import family_of
from ilvr_ds.model.injection import last_hidden, write_images
from ilvr_ds.model.layers.attention import use_packed_attention, use_varlen_attention
from ilvr_ds.model.layers.fused import use_fused_kernels
from ilvr_ds.model.student import build_text_model, detach_tower, load_config, load_student
from ilvr_ds.model.vision import VisionTower
from tests.bench.syncs import Syncs
from tests.golden_set import GoldenSet, golden_set
from tests.model.test_rollout import ce_and_grads, model_of
from tests.qwen3_set import qwen3_set

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPU, CPU = torch.device("cuda"), torch.device("cpu")
SOME = [5, 0, 4]
"""0, 3 and 2 segments; all with images."""


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> GoldenSet:
    is_golden = request.param == "qwen2_5_vl"
    return golden_set() if is_golden else qwen3_set(tmp_path_factory.mktemp("gpu") / "model")


def parts_of(found: GoldenSet, device: torch.device, dtype: torch.dtype, kernels: str) -> tuple[Any, VisionTower]:
    """The model without its tower, as an engine sets it up, and the tower."""
    model = load_student(found.model, dtype, num_tokens=0)
    tower: Any = detach_tower(model, lambda parameters: nullcontext()).to(device)
    model.to(device)
    language_model = model.model.language_model
    use_packed_attention(language_model, "auto" if kernels == "auto" else "sdpa", device, dtype)
    if kernels == "auto":
        use_varlen_attention(tower, device, dtype)
        for network in (tower, language_model):
            use_fused_kernels(network, kernels, device, dtype)
    return model, VisionTower(tower, found.encoder.images.mean, found.encoder.images.std).to(device)


def computed(found: GoldenSet, device: torch.device, dtype: torch.dtype, kernels: str) -> tuple[Tensor, ...]:
    """Features, states and the embedding's gradient of some samples in one packed row."""
    model, tower = parts_of(found, device, dtype, kernels)
    window = found.window(SOME, len(SOME), "packed").to(device)
    micro, features = window.micro_batches[0], tower(window.images[0])
    language_model = model.model.language_model
    embeddings = write_images(language_model.embed_tokens(micro.tokens.input_ids), micro.tokens, features)
    hidden = last_hidden(language_model, micro.tokens, embeddings, features=features)
    hidden.float().square().mul(torch.linspace(0, 1, hidden.shape[-1], device=device)).sum().backward()
    gradient = language_model.layers[0].self_attn.k_proj.weight.grad
    return tuple(x.detach().float().cpu() for x in (features, hidden, gradient))


def test_fused_in_bf16_it_is_as_near_to_float32_as_the_stock_layers(found: GoldenSet) -> None:
    """Catches kernels that take a family's norms, rotations or windows for another's."""
    exact = computed(found, CPU, torch.float32, "stock")
    stock, fused = (computed(found, GPU, torch.bfloat16, kernels) for kernels in ("stock", "auto"))
    for name, wanted, near, ours in zip(("features", "states", "gradient"), exact, stock, fused, strict=True):
        errors = [float((x - wanted).norm() / wanted.norm()) for x in (near, ours)]
        assert errors[1] < max(2 * errors[0], 0.01), (name, errors)


@pytest.mark.parametrize("gradient", ["full", "detached"])
def test_recorded_latents_are_called_ones(found: GoldenSet, gradient: Any) -> None:
    """In float64; images are added once, in the first text, whatever is replayed behind it."""
    results = []
    for is_recorded in (False, True):
        model = model_of(found).to(GPU).train()
        micro = found.free_window(SOME, len(SOME), "left").micro_batches[0].to(GPU)
        size = found.settings["latent_size"]
        stage = StageTwo(model, LossConfig(), 0, size, gradient, has_recorded_latents=is_recorded)
        hidden = stage.train().hidden(micro, features_of(found, micro))
        results.append(ce_and_grads(model, hidden, micro))
    (loss, grads), (again, others) = results
    assert again == pytest.approx(loss, rel=1e-11) and grads.keys() == others.keys()
    for name, grad in grads.items():
        assert float((grad - others[name]).norm() / grad.norm().clamp(min=1e-30)) < 1e-9, name


def features_of(found: GoldenSet, micro: MicroBatch) -> Tensor:
    config = load_config(str(found.weights))
    rows, width = int(micro.tokens.image_rows.max()) + 1, family_of(config).feature_width(config.vision_config)
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(0)).double().to(GPU)


def test_neither_student_nor_teacher_waits(found: GoldenSet) -> None:
    """Of the host, between a batch and its states: neither tower, what is added at images, nor the query."""
    model, tower = parts_of(found, GPU, torch.bfloat16, "auto")
    language_model = model.model.language_model
    teacher = ContextEncoder(build_text_model(language_model.config, "sdpa").to(GPU, torch.bfloat16))
    use_packed_attention(teacher.language_model, "auto", GPU, torch.bfloat16)
    window = found.window(SOME, len(SOME), "packed").pin_memory().to(GPU)
    micro, syncs = window.micro_batches[0], Syncs()
    for last in (False, True):  # the first call compiles and caches
        with syncs if last else nullcontext():
            features = tower(window.images[0])
            embeddings = write_images(language_model.embed_tokens(micro.tokens.input_ids), micro.tokens, features)
            last_hidden(language_model, micro.tokens, embeddings, features=features).sum().backward()
            with torch.no_grad():
                teacher(window.tokens, features, window.context)
        torch.cuda.synchronize()
    assert not syncs.places, dict(syncs.places)
