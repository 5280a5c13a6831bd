"""The formula against numbers by hand and against what torch counts."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ilvr_ds.config import LossConfig
from ilvr_ds.data.window import Window
from ilvr_ds.distill.query import ContextEncoder
from ilvr_ds.distill.selection import Targets
from ilvr_ds.distill.stage1 import StageOne
from ilvr_ds.model.injection import last_hidden, write_images
from ilvr_ds.model.student import build_text_model, detach_tower, load_student, prepare_student
from ilvr_ds.model.vision import VisionTower
from ilvr_ds.monitoring.throughput import model_flops
from ilvr_ds.monitoring.work import work_of
from ilvr_ds.planning.flops import ModelFlops, Work
from ilvr_ds.planning.geometry import KNOWN
from tests.golden_set import golden_set


def test_a_sample_of_7b_by_hand() -> None:
    geometry = KNOWN["7b"]
    work = Work(samples=1, tokens=1030, squares=1030**2, labels=280, patches=5376, image_squares=2304**2 + 3 * 1024**2,
                window_squares=84 * 64**2)  # fmt: skip
    flops = ModelFlops(geometry, trained=7_615_616_512, frozen=0, has_teacher=True).of(work)
    attention = 4 * 28 * (28 * 128) * 1030**2 / 2
    assert flops.student == 6 * 7_615_616_512 * 1030 + 3 * attention
    assert flops.teacher == 2 * (7_615_616_512 - 152064 * 3584) * 1030 + attention
    full, windows = 4 * (2304**2 + 3 * 1024**2), 28 * 84 * 64**2
    assert flops.vision == 2 * 676_550_144 * 5376 + 4 * 1280 * (full + windows)
    assert flops.total == pytest.approx(7.01e13, rel=0.01)


def test_frozen_weights_cost_their_gradient_by_the_input_alone() -> None:
    flops = ModelFlops(KNOWN["3b"], trained=7, frozen=100, has_teacher=False).of(Work(tokens=10))
    assert (flops.student, flops.teacher, flops.vision) == (6 * 7 * 10 + 4 * 100 * 10, 0, 0)


def test_work_adds_up() -> None:
    assert Work(1, 2, 3, 4, 5, 6, 7) + Work(10, 20, 30, 40, 50, 60, 70) == Work(11, 22, 33, 44, 55, 66, 77)


def counted(call: Callable[[], Any]) -> float:
    """FLOPs of matrix products, attention written out in them: torch does not count a CPU's own attention."""
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        call()
    return float(counter.get_total_flops())


def test_it_is_what_torch_counts() -> None:
    """One sample, so that nothing is padded. Written out, attention computes its whole square; the formula has half."""
    golden = golden_set()
    window = golden.window([0], 1)
    [micro], work = window.micro_batches, work_of(window)
    model = load_student(golden.model, torch.float32, len(golden.encoder.tokenizer))
    tower = VisionTower(detach_tower(model, lambda _: nullcontext()), [0.5] * 3, [0.5] * 3)
    prepare_student(model, golden.model)
    config = model.config
    teacher = ContextEncoder(build_text_model(config.text_config, "sdpa"))
    stage = StageOne(model, LossConfig(contrastive_weight=0.0), seed=0)
    formula = model_flops(stage, config, has_teacher=True)
    assert formula.trained == formula.geometry.text.total and formula.frozen == 0
    expected = formula.matmul(work)
    masked = 2 * config.text_config.num_hidden_layers * config.text_config.hidden_size * work.squares

    features = tower.features(window)
    assert counted(lambda: tower.features(window)) == expected.vision
    angles = counted(lambda: rotate(teacher, window))
    assert counted(lambda: read(teacher, window, features)) == expected.teacher + masked + angles
    targets = first_candidates(window, features, golden.model.latent_size)
    # the loss's reference compares each slot with all candidates; on a GPU its kernel does, which nobody counts
    compared = 2 * targets.indices.numel() * targets.candidates.numel()
    assert counted(lambda: stage(micro, features, targets, 0)) == expected.student / 3 + masked + compared + angles
    both = counted(lambda: stage(micro, features, targets, 0)["ce"].backward())
    logits_again = 2 * formula.geometry.text.embedding * work.labels
    assert both == expected.student + 3 * masked + logits_again + compared + angles


def read(teacher: ContextEncoder, window: Window, features: torch.Tensor) -> None:
    """The teacher's forward, without what is averaged after it."""
    embeddings = teacher.language_model.embed_tokens(window.tokens.input_ids)
    with torch.no_grad():
        last_hidden(teacher.language_model, window.tokens, write_images(embeddings, window.tokens, features))


def rotate(teacher: ContextEncoder, window: Window) -> None:
    """The angles, which transformers 5.17 makes by a matrix product of one column; the formula leaves them out."""
    teacher.language_model.rotary_emb(torch.zeros(1), window.tokens.position_ids)


def first_candidates(window: Window, features: torch.Tensor, k: int) -> Targets:
    """Targets without a teacher."""
    offsets = window.candidates.offsets
    M = len(offsets) - 1
    candidates = features[window.candidates.rows[:, 0]]
    indices = offsets[:-1, None] + torch.arange(k)
    queries = torch.zeros(M, features.shape[1])
    return Targets(candidates, offsets, indices, torch.full((M,), k), torch.zeros(M), queries)
