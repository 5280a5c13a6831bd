from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ilvr_ds.config import LossConfig
from ilvr_ds.data.window import MicroBatch, Window
from ilvr_ds.distill import stage1
from ilvr_ds.distill.selection import Targets
from ilvr_ds.distill.stage1 import Negatives, StageOne
from ilvr_ds.model.student import load_student
from ilvr_ds.ops.noise import gaussian_noise
from tests.golden_set import GoldenSet

NOISY = LossConfig(target_noise_std=0.5)


@pytest.fixture(scope="module")
def model(golden: GoldenSet) -> Any:
    return load_student(golden.model, torch.float32, len(golden.encoder.tokenizer))


@pytest.fixture(scope="module")
def window(golden: GoldenSet) -> Window:
    return golden.window([0, 1, 5], micro_batch_size=3)


def features_of(window: Window, model: Any) -> Tensor:
    rows, width = sum(len(images.window_index) for images in window.images), model.config.text_config.hidden_size
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(0)).to(model.dtype)


def targets_of(window: Window, features: Tensor, k: int) -> Targets:
    """The first candidates of each segment, one fewer than slots."""
    offsets = window.candidates.offsets
    indices = offsets[:-1, None] + torch.arange(k)
    indices[:, -1] = -1
    candidates = features[window.candidates.rows[:, 0]]
    assert bool((indices.amax(1) < offsets[1:]).all())
    M = len(indices)
    kept = torch.full((M,), k - 1, dtype=torch.int32)
    return Targets(candidates, offsets, indices, kept, torch.zeros(M), torch.zeros(M, candidates.shape[1]))


@torch.no_grad()
def losses(
    stage: StageOne, window: Window, step: int = 0, foreign: Negatives | None = None, micro: MicroBatch | None = None
) -> dict[str, Tensor]:
    features = features_of(window, stage.model)
    micro = micro or window.micro_batches[0]
    targets = targets_of(window, features, micro.latent_slots.shape[1]).of(micro)
    sums: dict[str, Tensor] = stage(micro, features, targets, step, foreign)
    return sums


def test_noise_is_drawn_anew_at_each_step_of_training(model: Any, window: Window) -> None:
    stage = StageOne(model, NOISY, seed=1).train()
    first, again, later = (float(losses(stage, window, step)["alignment"]) for step in (3, 3, 4))
    assert first == again != later


def test_noise_is_added_to_the_target_of_each_slot(model: Any, window: Window) -> None:
    """One slot at a time: catches noise on the prediction, and that of another slot, segment, sample, seed or step."""
    stage, micro = StageOne(model, NOISY, seed=3).train(), window.micro_batches[0]
    features, K = features_of(window, model), micro.latent_slots.shape[1]
    targets = targets_of(window, features, K).of(micro)
    with torch.no_grad():
        hidden = stage.hidden(micro, features, targets).flatten(0, 1).double()
    wanted, seen = 0.0, [0, 0, 0]
    for segment, sample in enumerate(micro.sample_of_segment.tolist()):
        place, seen[sample] = seen[sample], seen[sample] + 1
        for slot, row in enumerate(targets.indices[segment].tolist()):
            if row < 0:
                continue
            stream = torch.tensor([[[0, 1, 5][sample], place * K + slot]])
            noise = 0.5 * gaussian_noise(3, 9, stream, hidden.shape[1])[0].double()
            prediction = hidden[micro.latent_slots[segment, slot] - 1]
            wanted += 1 - float(torch.cosine_similarity(prediction, targets.candidates[row].double() + noise, dim=0))
    assert max(seen) > 1, "of one segment a sample, no neighbour's noise could be mistaken for its own"
    assert float(losses(stage, window, step=9)["alignment"]) == pytest.approx(wanted, rel=1e-5)


def test_every_slot_has_noise_of_its_own(model: Any, window: Window, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches streams that neighbouring segments share."""
    streams: list[Tensor] = []

    def drawn(seed: int, step: int, stream: Tensor, width: int) -> Tensor:
        streams.append(stream)
        return gaussian_noise(seed, step, stream, width)

    monkeypatch.setattr(stage1, "gaussian_noise", drawn)
    losses(StageOne(model, NOISY, seed=1).train(), window)
    [stream] = streams
    assert len(stream.unique(dim=0)) == len(stream) == window.micro_batches[0].latent_slots.numel()


def test_evaluation_has_no_noise(model: Any, window: Window) -> None:
    clean = losses(StageOne(model, replace(NOISY, target_noise_std=0.0), seed=1).train(), window)
    evaluated = losses(StageOne(model, NOISY, seed=1).eval(), window, step=7)
    assert torch.equal(evaluated["alignment"], clean["alignment"])
    assert torch.equal(evaluated["contrastive"], clean["contrastive"])


def test_losses_do_not_depend_on_which_samples_share_a_micro_batch(model: Any, golden: GoldenSet) -> None:
    stage = StageOne(model, NOISY, seed=1).train()
    for side in ("left", "right"):
        together = golden.window([0, 1, 5], 3, side)
        sums = losses(stage, together)
        whole = features_of(together, model)
        targets = targets_of(together, whole, golden.settings["latent_size"])
        # the same window cut into three micro-batches: features must be put where the cut window expects them
        cut = golden.window([0, 1, 5], 1, side)
        assert torch.equal(cut.candidates.offsets, together.candidates.offsets)
        features = torch.zeros_like(features_of(cut, model))
        features[cut.candidates.rows.flatten()] = whole[together.candidates.rows.flatten()]
        features[cut.tokens.image_rows] = whole[together.tokens.image_rows]
        with torch.no_grad():
            parts = [stage(micro, features, targets.of(micro), 0) for micro in cut.micro_batches]
        for name in ("ce", "alignment", "contrastive"):
            # float32 sums of a few hundred terms in another order
            torch.testing.assert_close(sum(part[name] for part in parts), sums[name], rtol=1e-4, atol=1e-4)


class Says(nn.Module):
    """A head whose most probable tokens are given."""

    def __init__(self, ids: Tensor) -> None:
        super().__init__()
        self.ids = ids

    def forward(self, hidden: Tensor, labels: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
        return torch.zeros(len(labels)), self.ids


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("nothing", [True, True, True]),
        ("the answer of sample 1", [True, False, True]),
        ("a word before the answer", [True, True, True]),
        ("sample 2 has no answer", [True, True, False]),
    ],
)
def test_an_answer_is_right_when_all_its_tokens_are(
    model: Any, window: Window, monkeypatch: pytest.MonkeyPatch, change: str, expected: list[bool]
) -> None:
    micro = window.micro_batches[0]
    said = micro.label_ids.clone()
    mine = micro.answer_rows[micro.answer_samples == 1]
    if change == "the answer of sample 1":
        said[mine[-1]] += 1
    elif change == "a word before the answer":
        said[mine[0] - 1] += 1
    elif change == "sample 2 has no answer":
        is_other = micro.answer_samples != 2
        micro = replace(
            micro,
            answer_rows=micro.answer_rows[is_other],
            answer_samples=micro.answer_samples[is_other],
            has_answer=torch.tensor([True, True, False]),
        )
    stage = StageOne(model, NOISY, seed=0).eval()
    monkeypatch.setitem(model._modules, "lm_head", Says(said))
    assert losses(stage, window, micro=micro)["right"].tolist() == expected


def test_candidates_of_other_ranks_are_negatives_of_every_slot(model: Any, window: Window) -> None:
    settings = LossConfig(contrastive_negatives="world", contrastive_temperature=0.5)
    stage = StageOne(model, settings, seed=0).eval()
    features, micro = features_of(window, model), window.micro_batches[0]
    foreign = torch.randn(5, features.shape[1], generator=torch.Generator().manual_seed(1))
    targets = targets_of(window, features, micro.latent_slots.shape[1]).of(micro)
    with torch.no_grad():
        hidden = stage.hidden(micro, features, targets).flatten(0, 1).double()
    unit = torch.nn.functional.normalize(targets.candidates.double(), dim=1)
    others = torch.nn.functional.normalize(foreign.double(), dim=1)
    samples = micro.sample_of_segment.tolist()
    bounds = targets.offsets.tolist()
    wanted = 0.0
    for segment, slots in enumerate(micro.latent_slots.tolist()):
        chosen = [row for row in targets.indices[segment].tolist() if row >= 0]
        own = [row for row in range(bounds[segment], bounds[segment + 1]) if row not in chosen]
        strange = [
            row
            for other, sample in enumerate(samples)
            if sample != samples[segment]
            for row in range(bounds[other], bounds[other + 1])
        ]
        negatives = torch.cat([unit[own + strange], others])
        for position, row in zip(slots, chosen, strict=False):
            z = hidden[position - 1] / hidden[position - 1].norm()
            positive, rest = float(z @ unit[row]) / 0.5, (negatives @ z / 0.5).exp().sum()
            wanted -= math.log(math.exp(positive) / (math.exp(positive) + float(rest)))
    found = losses(stage, window, foreign=Negatives(foreign, torch.full((5,), 99)))
    assert float(found["contrastive"]) == pytest.approx(wanted, rel=1e-5)
    assert torch.equal(found["alignment"], losses(stage, window)["alignment"])


def test_a_sample_that_a_step_holds_twice_is_no_negative_of_itself(model: Any, golden: GoldenSet) -> None:
    """A mixture passes a small set again and again. Its own targets would be among the negatives, at a cosine of 1."""
    twice, step = golden.window([0, 0], micro_batch_size=2), golden.window([0, 1], micro_batch_size=2)
    alone, together = (
        StageOne(model, LossConfig(contrastive_negatives=negatives), seed=0).eval()
        for negatives in ("segment", "micro_batch")
    )
    assert torch.equal(losses(together, twice)["contrastive"], losses(alone, twice)["contrastive"])
    assert losses(together, step)["contrastive"] > losses(alone, step)["contrastive"], "others are"
    micro = twice.micro_batches[0]
    candidates = targets_of(twice, features_of(twice, model), micro.latent_slots.shape[1]).candidates
    foreign = Negatives(candidates, torch.zeros(len(candidates), dtype=torch.int64))
    assert torch.equal(losses(together, twice, foreign=foreign)["contrastive"], losses(alone, twice)["contrastive"])
