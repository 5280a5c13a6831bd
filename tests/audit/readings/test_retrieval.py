from __future__ import annotations

import pytest
import torch

from ilvr_ds.audit.readings.retrieval import Retrieval, expected_hits
from ilvr_ds.audit.readings.targets import Chosen


def test_hits_are_those_of_ranks() -> None:
    cosines = torch.tensor([[0.9, 0.1, 0.2, 0.3, 0.4, 0.5], [0.0, 0.9, 0.8, 0.7, 0.6, 0.5]])
    assert expected_hits(cosines, cosines[:, 0]) == pytest.approx([1, 1, 2 / 6, 10 / 6])


def test_ties_are_chance() -> None:
    """Catches a latent that is equally near to all and is said to find its target."""
    same = torch.full((3, 8), 0.5)
    assert expected_hits(same, same[:, 0]) == pytest.approx([3 / 8, 3 * 5 / 8, 3 / 8, 3 * 5 / 8])


def test_a_sample_is_not_held_against_itself() -> None:
    pool = {number: Chosen((torch.eye(8)[number : number + 1],), ((0,),)) for number in range(3)}
    found = Retrieval(pool)(0, [torch.eye(8)[:1]], pool[0])
    assert found == {"latents": 1, "image": [1, 1, 1, 1], "others": [1, 1, pytest.approx(1 / 3), 1]}
    wrong = Retrieval(pool)(0, [torch.eye(8)[1:2]], pool[0])
    assert wrong["others"][:2] == [0, 1]


def test_slots_without_a_target_do_not_count() -> None:
    chosen = Chosen((torch.eye(4), torch.eye(4)), ((2,), ()))
    found = Retrieval({0: chosen})(1, [torch.eye(4)[[2, 0]], torch.eye(4)[:2]], chosen)
    assert found["latents"] == 1 and found["image"][0] == 1
