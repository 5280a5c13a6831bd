"""What a window of stage 2 is on several ranks: as many rounds everywhere, one count of all tokens."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ilvr_ds import dist
from ilvr_ds.training.stage2 import StageTwoStep


@dataclass(frozen=True)
class Layout:
    rounds: int

    def with_rounds(self, most: int, latent_size: int) -> Layout:
        assert latent_size == 4
        return Layout(most)


@dataclass(frozen=True)
class Micro:
    rollout: Layout


@dataclass(frozen=True)
class Window:
    supervised: torch.Tensor
    micro_batches: tuple[Micro, ...]


def prepared(supervised: int) -> Any:
    window = Window(torch.tensor([supervised]), (Micro(Layout(2)), Micro(Layout(0))))
    step: Any = SimpleNamespace(
        phases=lambda name: nullcontext(), vision=SimpleNamespace(features=lambda window: "features"), latent_size=4
    )
    return StageTwoStep.prepare(step, window)  # type: ignore[arg-type]


def test_each_micro_batch_has_the_rounds_of_the_rank_with_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches ranks that make another number of layer calls: under ZeRO-3 they would wait for ever."""
    monkeypatch.setattr(dist, "gather_on_host", lambda mine: [mine, [1, 3], [0, 5]])
    monkeypatch.setattr(dist, "sum_over_ranks", lambda count: count + 30)
    found = prepared(supervised=7)
    assert [micro.rollout.rounds for micro in found.window.micro_batches] == [2, 5]
    assert found.supervised.tolist() == 37 and found.features == "features"


def test_a_window_without_labels_divides_by_one() -> None:
    assert prepared(supervised=0).supervised.tolist() == 1


def test_where_nothing_was_seen_no_loss_is_said() -> None:
    """Catches a loss of 0 in an interval whose steps were all skipped."""
    step: Any = SimpleNamespace(types=(), sets=())
    step.losses = lambda sums: StageTwoStep.losses(step, sums)
    sums = {"ce": 6.0, "supervised": 3.0, "right": 0.0, "answers": 0.0}
    assert StageTwoStep.metrics(step, sums) == {"loss/total": 2.0, "loss/ce": 2.0}
    assert StageTwoStep.metrics(step, dict.fromkeys(sums, 0.0)) == {}
