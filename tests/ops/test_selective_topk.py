"""Adaptive selection: against loops on every device, native code against the reference in float64 on a GPU."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from ilvr_ds.ops import reference
from ilvr_ds.ops.selective_topk import selective_topk
from tests.ops import loops
from tests.ops.loops import Ragged
from tests.ops.native import DEVICES, DTYPES, GPU, assert_as_good, native_operators, needs_gpu, poisoned_memory

__all__ = ["native_operators"]
SIZES = [[5], [1], [0, 6, 0, 2, 0], [40, 1, 7, 300]]


def draw(sizes: list[int], width: int, device: str, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """query float32, candidates, offsets."""
    case = Ragged.draw(sizes, 1, width, seed)
    return case.query.float().to(device), case.candidates.to(device, dtype), case.offsets.to(device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("width", [1, 7, 64, 333])
def test_the_loop_picks_the_same_rows(sizes: list[int], width: int, dtype: torch.dtype, device: str) -> None:
    query, candidates, offsets = draw(sizes, width, device, dtype)
    indices, kept, entropy = (x.cpu() for x in selective_topk(query, candidates, offsets, 6, 0.8, 0.2))
    for m in range(len(sizes)):
        first, last = int(offsets[m]), int(offsets[m + 1])
        if width == 1:  # all cosines are 1 or -1: ties
            assert sorted(indices[m, : kept[m]].tolist()) == indices[m, : kept[m]].tolist() or last - first > kept[m]
        else:
            rows, nats = loops.select(query[m].cpu(), candidates[first:last].cpu(), 6, 0.8, 0.2)
            assert indices[m].tolist() == [first + row for row in rows] + [-1] * (6 - len(rows))
            assert entropy[m].item() == pytest.approx(nats, abs=1e-5)
        assert kept[m] == (indices[m] >= 0).sum()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("given", ["pool", "score", "pool and score"])
def test_the_loop_picks_the_same_rows_of_a_pool(given: str, dtype: torch.dtype, device: str) -> None:
    """Catches rows outside the pool that are picked, or that take of the mass; one segment's pool is empty."""
    sizes = [1, 40, 0, 7, 300, 5]
    query, candidates, offsets = draw(sizes, 64, device, dtype)
    generator = torch.Generator().manual_seed(3)
    pool = torch.rand(len(candidates), generator=generator) < 0.3
    pool[int(offsets[3]) : int(offsets[4])] = False
    score = torch.rand(len(candidates), generator=generator)
    more = {"pool": pool.to(device), "score": score.to(device)}
    more = {name: value for name, value in more.items() if name in given}
    for operator in (selective_topk, reference.selective_topk):
        indices, kept, entropy = (x.cpu() for x in operator(query, candidates, offsets, 6, 0.8, 0.2, **more))
        for m in range(len(sizes)):
            here = slice(int(offsets[m]), int(offsets[m + 1]))
            part = {name: value.cpu()[here] for name, value in more.items()}
            rows, nats = loops.select(query[m].cpu(), candidates[here].cpu(), 6, 0.8, 0.2, **part)
            assert indices[m].tolist() == [here.start + row for row in rows] + [-1] * (6 - len(rows))
            assert entropy[m].item() == pytest.approx(nats, abs=1e-5)
            assert kept[m] == len(rows)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [700, 5000])
def test_a_pool_of_all_changes_no_bit_and_long_segments_have_pools_too(rows: int, device: str) -> None:
    query, candidates, offsets = draw([rows, 3, rows], 16, device, torch.bfloat16, seed=rows)
    plain = selective_topk(query, candidates, offsets, 8, 0.9, 0.3)
    everyone = torch.ones(len(candidates), dtype=torch.bool, device=device)
    assert all(map(torch.equal, plain, selective_topk(query, candidates, offsets, 8, 0.9, 0.3, everyone)))
    few = torch.arange(len(candidates), device=device) % 50 == 7
    indices, kept, _ = selective_topk(query, candidates, offsets, 1024, 1.1, 0.3, few)
    wanted, number, _ = reference.selective_topk(query.double(), candidates.double(), offsets, 1024, 1.1, 0.3, few)
    assert torch.equal(indices, wanted) and torch.equal(kept, number) and kept[1] == 0


@pytest.mark.parametrize("device", GPU)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_entropy_is_as_good_as_pytorchs_own(dtype: torch.dtype, device: str) -> None:
    seed = torch.seed() % 2**32
    query, candidates, offsets = draw([400, 3, 1000], 513, device, dtype, seed)
    ours = selective_topk(query, candidates, offsets, 5, 0.9, 0.05)[2]
    theirs = reference.selective_topk(query, candidates, offsets, 5, 0.9, 0.05)[2]
    truth = reference.selective_topk(query.double(), candidates.double(), offsets, 5, 0.9, 0.05)[2]
    assert_as_good(ours, theirs, truth, floor=2.0**-21)  # a logit is up to 20, and counts with its ulp


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [700, 5000])
@pytest.mark.parametrize("k", [1, 8, 1024])
def test_long_segments_rank_like_a_stable_sort(rows: int, k: int, device: str) -> None:
    query, candidates, offsets = draw([rows, 3, rows], 16, device, torch.float32, seed=rows)
    indices, kept, _ = selective_topk(query, candidates, offsets, k, 1.1, 0.3)
    cosine = reference.candidate_cosines(query.double(), candidates.double(), offsets)
    for m in range(3):
        first, last = int(offsets[m]), int(offsets[m + 1])
        best = first + torch.argsort(cosine[first:last], descending=True, stable=True)[:k]
        assert kept[m] == len(best)
        assert torch.allclose(cosine[indices[m, : kept[m]]], cosine[best], atol=1e-6)
        assert len(indices[m, : kept[m]].unique()) == kept[m]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [48, 51])
def test_of_equal_rows_the_lower_comes_first(width: int, dtype: torch.dtype, device: str) -> None:
    query, candidates, offsets = draw([50], width, device, dtype)
    candidates, offsets = candidates.repeat(60, 1), offsets * 60
    indices = selective_topk(query, candidates, offsets, 180, 1.1, 1.0)[0][0].cpu().view(3, 60)
    assert torch.equal(indices, indices[:, :1] % 50 + 50 * torch.arange(60))


@pytest.mark.parametrize("device", DEVICES)
def test_zero_rows_and_zero_queries_have_cosine_0(device: str) -> None:
    query, candidates, offsets = draw([3, 4], 9, device, torch.bfloat16)
    query[0] = 0
    candidates[3] = 0
    candidates[4:] = -query[1].bfloat16()
    indices, _, entropy = selective_topk(query, candidates, offsets, 2, 0.5, 0.1)
    assert indices.tolist() == [[0, 1], [3, -1]]
    assert entropy[0].item() == pytest.approx(torch.tensor(3.0).log().item(), abs=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_without_segments_or_candidates_nothing_is_picked(device: str) -> None:
    for sizes, k in (([], 2), ([0, 0], 2), ([3], 0)):
        query, candidates, offsets = draw(sizes, 5, device, torch.float32)
        indices, kept, entropy = selective_topk(query, candidates, offsets, k, 0.9, 1.0)
        assert indices.shape == (len(sizes), k) and not (indices >= 0).any()
        assert kept.tolist() == [0] * len(sizes) and entropy.shape == (len(sizes),)


@pytest.mark.parametrize("device", GPU)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_may_begin_anywhere_in_memory(dtype: torch.dtype, device: str) -> None:
    query, candidates, offsets = draw([30, 20], 64, device, dtype)
    shifted = torch.empty(candidates.numel() + 1, device=device, dtype=dtype)[1:].view_as(candidates).copy_(candidates)
    for a, b in zip(
        selective_topk(query, candidates, offsets, 4, 0.9, 0.2), selective_topk(query, shifted, offsets, 4, 0.9, 0.2),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("device", GPU)
def test_every_number_of_the_outputs_is_written(device: str) -> None:
    arguments = (*draw([30, 0, 1, 20], 64, device, torch.bfloat16), 7, 0.9, 0.2)
    arguments += (torch.arange(51, device=device) % 3 == 0,)
    wanted = selective_topk(*arguments)
    with poisoned_memory():
        actual = selective_topk(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(actual, wanted, strict=True))


@pytest.mark.parametrize("device", GPU)
def test_it_is_a_well_behaved_operator_that_compiles_without_a_break(device: str) -> None:
    plain = (*draw([30, 2], 24, device, torch.bfloat16), 7, 0.9, 0.2)
    pool, score = torch.arange(32, device=device) % 3 == 0, torch.linspace(0, 1, 32, device=device)
    compiled = torch.compile(selective_topk, fullgraph=True, backend="aot_eager")
    for arguments in (plain, (*plain, pool), (*plain, pool, score)):
        torch.library.opcheck(torch.ops.ilvr_ds.selective_topk.default, arguments)
        assert all(torch.equal(a, b) for a, b in zip(compiled(*arguments), selective_topk(*arguments), strict=True))


@needs_gpu
def test_it_can_be_captured_and_never_waits_for_the_gpu() -> None:
    query, candidates, offsets = draw([300, 2, 40], 256, "cuda", torch.bfloat16)
    pool = torch.arange(342, device="cuda") % 3 == 0
    wanted = selective_topk(query, candidates, offsets, 7, 0.9, 0.2, pool)
    graph, static = torch.cuda.CUDAGraph(), candidates.flip(0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        selective_topk(query, static, offsets, 7, 0.9, 0.2, pool)
        with torch.cuda.graph(graph):
            captured = selective_topk(query, static, offsets, 7, 0.9, 0.2, pool)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    static.copy_(candidates)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, wanted, strict=True))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"candidates": torch.zeros(5, 4)}, ValueError, "candidates has shape [5, 4]: expected [N, D] with D = 3"),
        ({"candidates": torch.zeros(5, 3).long()}, TypeError, "candidates [5, 3] is torch.int64: expected float32"),
        ({"candidate_offsets": torch.tensor([0, 5, 5])}, ValueError, "candidate_offsets has shape [3]"),
        ({"candidate_offsets": torch.tensor([0, 4])}, ValueError, "candidate_offsets [2] = [0, 4]: expected ascending"),
        ({"candidates": torch.zeros(5, 3, device="meta")}, ValueError, "candidates [5, 3] is on meta: expected cpu"),
        ({"k": -1}, ValueError, "k = -1: expected 0 or more"),
        ({"pool": torch.ones(4, dtype=torch.bool)}, ValueError, "pool has shape [4]: expected [N] with N = 5"),
        ({"pool": torch.ones(5)}, TypeError, "pool [5] is torch.float32: expected bool"),
        ({"score": torch.ones(5, 1)}, ValueError, "score has shape [5, 1]: expected [N] with N = 5"),
        ({"temperature": 0.0}, ValueError, "temperature = 0.0: expected more than 0"),
    ],
)
def test_bad_input_is_named(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    good = {
        "query": torch.ones(1, 3), "candidates": torch.ones(5, 3), "candidate_offsets": torch.tensor([0, 5]),
        "k": 2, "top_p": 0.9, "temperature": 1.0,
    }  # fmt: skip
    with pytest.raises(error, match=re.escape(message)):
        selective_topk(**(good | changes))  # type: ignore[arg-type]
