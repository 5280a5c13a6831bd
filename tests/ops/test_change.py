"""Which candidates changed: against loops, and on towers that mix what they see."""

from __future__ import annotations

import statistics

import pytest
import torch
from torch import Tensor

from ilvr_ds.ops import change
from ilvr_ds.ops.change import NOISE, change_at_place, change_to_nearest, most_changed
from tests.ops import loops
from tests.ops.native import DEVICES


def rows(count: int, width: int = 32, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("at_a_time", [3, 4096])
def test_change_is_what_a_loop_says(
    monkeypatch: pytest.MonkeyPatch, device: str, dtype: torch.dtype, at_a_time: int
) -> None:
    monkeypatch.setattr(change, "ROWS", at_a_time)
    candidates, earlier = rows(10).to(device, dtype), rows(17, seed=1).to(device, dtype)
    before = torch.randint(17, (10, 2), generator=torch.Generator().manual_seed(2)).to(device)
    candidates[3] = 0
    earlier[before[5, 1]] = 2 * candidates[5]
    at_place = [1 - max(loops.cosine(candidates[n], earlier[e]) for e in before[n]) for n in range(10)]
    nearest = [1 - max(loops.cosine(candidates[n], row) for row in earlier) for n in range(10)]
    assert change_at_place(candidates, earlier, before).tolist() == pytest.approx(at_place, abs=1e-6)
    assert change_to_nearest(candidates, earlier).tolist() == pytest.approx(nearest, abs=1e-6)
    assert at_place[3] == 1 and at_place[5] == pytest.approx(0)


def one_by_one(changes: list[float], least: int, most: int) -> tuple[list[bool], list[bool], bool]:
    """pool, stands out, unchanged of one segment."""
    steps = [max(0.0, 2 * c) ** 0.5 for c in changes]
    median = statistics.median_low(steps)
    spread = statistics.median_low([abs(s - median) for s in steps])
    stands_out = [s > max(median + max(5 * spread, NOISE), max(steps) / 4) for s in steps]
    if max(steps) - min(steps) <= NOISE:
        return [True] * len(steps), stands_out, True
    order = sorted(range(len(steps)), key=lambda n: (-changes[n], n))
    chosen = [n for n in order if stands_out[n]]
    room = least if chosen else most
    chosen += [n for n in order[:room] if n not in chosen and steps[n] > min(steps) + NOISE]
    return [n in chosen and order.index(n) < most for n in range(len(steps))], stands_out, False


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", range(5))
def test_the_pool_is_what_a_loop_says(seed: int, device: str) -> None:
    """Segments of odd, even and no size, quiet ones, and some in which a few candidates stand out."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [7, 0, 1, 16, 40, 8, 33]
    offsets = torch.tensor([0, *torch.tensor(sizes).cumsum(0).tolist()])
    changes = [0.02 * torch.rand(size, generator=generator, dtype=torch.float64) ** 2 for size in sizes]
    for m, loud in ((3, 2), (4, 12), (6, 1)):
        changes[m][torch.randperm(sizes[m], generator=generator)[:loud]] += 0.5
    changes[5] *= 1e-3
    found = most_changed(torch.cat(changes).to(device), offsets.to(device), 3, 6)
    pool, stands_out = (x.cpu().split(sizes) for x in found[:2])
    for m, size in enumerate(sizes):
        if size:
            wanted = one_by_one(changes[m].tolist(), 3, 6)
            assert (pool[m].tolist(), stands_out[m].tolist(), bool(found.unchanged[m])) == wanted
    assert not stands_out[0].any() and pool[0].sum() > 3, "nothing stands out: the most changed"
    assert found.unchanged.tolist()[5] and pool[4].sum() == 6


def test_without_candidates_there_is_no_pool() -> None:
    found = most_changed(torch.empty(0), torch.tensor([0]), 2, 4)
    assert [len(part) for part in found] == [0, 0, 0]
    found = most_changed(torch.empty(0), torch.tensor([0, 0]), 2, 4)
    assert found.members.shape == (0,) and found.unchanged.shape == (1,)


def mixed(patches: Tensor, strength: float, seed: int) -> Tensor:
    """A tower that passes on to every patch of what all others hold, over a direction that all features share."""
    P = len(patches)
    attention = torch.softmax(rows(P, P, seed=seed), -1)
    return patches + strength * attention @ patches + 2 * rows(1, patches.shape[1], seed=9)


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0, 4.0])
@pytest.mark.parametrize("cells", [1, 2, 5])
def test_a_tower_that_mixes_does_not_hide_what_changed(strength: float, cells: int) -> None:
    """At 4 a patch is mostly what others hold. Those that were painted over are in the pool, and stand out."""
    missed = falsely = 0
    for seed in range(20):
        before = rows(64, 48, seed=seed)
        after = before.clone()
        painted = torch.randperm(64, generator=torch.Generator().manual_seed(seed))[:cells]
        after[painted] = rows(cells, 48, seed=1000 + seed)
        place = torch.arange(64)[:, None]
        moved = change_at_place(mixed(after, strength, seed), mixed(before, strength, seed), place)
        if strength == 4.0:
            assert moved.median() > 1e-5, "most patches have heard of it"
        found = most_changed(moved, torch.tensor([0, 64]), 0, 8)
        assert not found.unchanged.any() and found.members.sum() <= 8
        missed += int((~found.members[painted]).sum()) + int((~found.stands_out[painted]).sum())
        falsely += int(found.stands_out.sum()) - int(found.stands_out[painted].sum())
    assert missed == 0
    assert falsely <= 64, "of 1,280 patches"


def test_a_clean_change_is_the_whole_pool() -> None:
    """Nothing that stood still is added to fill it."""
    still = rows(16)
    moved = still.clone()
    moved[[3, 9]] = rows(2, seed=5)
    found = most_changed(change_at_place(moved, still, torch.arange(16)[:, None]), torch.tensor([0, 16]), 4, 8)
    assert found.members.nonzero()[:, 0].tolist() == [3, 9]


@pytest.mark.parametrize("noise", [0.0, 1e-3])
def test_a_picture_like_the_one_before_is_unchanged(noise: float) -> None:
    """Also where rounding to 16 bit, or another order of sums, makes every patch another one."""
    still = rows(16, 512)
    again = still + noise * rows(16, 512, seed=1)
    found = most_changed(change_at_place(again, still, torch.arange(16)[:, None]), torch.tensor([0, 16]), 4, 8)
    assert found.unchanged.tolist() == [True] and found.members.all() and not found.stands_out.any()
