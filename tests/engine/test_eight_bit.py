"""8-bit AdamW over tensors that bitsandbytes' kernels cannot count."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("bitsandbytes")

from bitsandbytes import functional
from bitsandbytes.optim import AdamW8bit

from ilvr_ds.config import OptimConfig
from ilvr_ds.engine import eight_bit
from ilvr_ds.engine.optimizer import build_optimizer

SETTINGS = OptimConfig(name="adamw_8bit", lr=0.01, weight_decay=0.1)


def draw(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("count", [4096 * 3, 4096 * 2 + 300, 4096, 300])
@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit"])
def test_pieces_give_the_bits_of_the_whole(count: int, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a piece that reads another's states or scales, a count of steps that each piece raises, and elements
    behind the last whole piece that are left out. Also after states were saved and loaded."""
    monkeypatch.setattr(eight_bit, "PIECE", 4096)
    weights = [nn.Parameter(draw(count, 0)) for _ in range(2)]
    common = {"lr": SETTINGS.lr, "betas": (SETTINGS.beta1, SETTINGS.beta2), "eps": SETTINGS.eps}
    whole = AdamW8bit([weights[0]], weight_decay=SETTINGS.weight_decay, **common)
    pieces = build_optimizer(OptimConfig(name=name, lr=0.01, weight_decay=0.1), [weights[1]])
    for step in range(4):
        if step == 2:
            pieces.load_state_dict(copy.deepcopy(pieces.state_dict()))
        for weight in weights:
            weight.grad = draw(count, step + 1)
        whole.step()
        pieces.step()
        assert torch.equal(*weights), step
    states = [optimizer.state[weight] for optimizer, weight in zip((whole, pieces), weights, strict=True)]
    assert states[0].keys() == states[1].keys() and states[1]["step"] == 4
    assert all(torch.equal(torch.as_tensor(states[0][key]), torch.as_tensor(states[1][key])) for key in states[0])
    assert len(pieces.state) == 1


def test_pieces_of_paged_states_are_marked_as_paged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an update that bitsandbytes refuses on a GPU, where paged states are marked tensors of the CPU."""
    monkeypatch.setattr(eight_bit, "PIECE", 4096)
    weight = nn.Parameter(draw(9000, 0))
    optimizer: Any = build_optimizer(OptimConfig(name="paged_adamw_8bit"), [weight])
    buffer, seen = optimizer.get_state_buffer, []

    def paged(*arguments: Any, **named: Any) -> Any:
        state = buffer(*arguments, **named)
        state.is_paged = True
        return state

    def update(name: str, grad: Any, part: Any, state1: Any, state2: Any, *rest: Any, **named: Any) -> None:
        seen.append((len(grad), len(part), state1.is_paged, state2.is_paged, len(state1), len(state2)))

    monkeypatch.setattr(optimizer, "get_state_buffer", paged)
    monkeypatch.setattr(optimizer, "prefetch_state", lambda _: None)
    monkeypatch.setattr(functional, "optimizer_update_8bit_blockwise", update)
    weight.grad = draw(9000, 1)
    optimizer.step()
    assert seen == [(size, size, True, True, size, size) for size in (4096, 4096, 808)]


def test_a_piece_is_whole_blocks_that_32_bits_can_count() -> None:
    """Catches scales that two pieces would share."""
    assert eight_bit.PIECE % eight_bit.BLOCK == 0 and eight_bit.PIECE < 2**31
