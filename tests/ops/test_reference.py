"""Pooling and selection against loops in float64."""

from __future__ import annotations

import math

import pytest
import torch

from ilvr_ds.ops.reference import candidate_cosines, pool_candidates, segment_of_rows, selective_topk
from tests.ops import loops
from tests.ops.loops import Ragged

SIZES = [[5], [1], [4, 9, 3], [0, 6, 0, 0, 2, 0], [1, 1, 30], [16, 1, 7, 12]]
EXACT = 1e-12
"""float64 against float64: some hundred roundings of 1e-16."""
ROUNDED = 1e-6
"""Sums in float32 over few features: some ten roundings of 6e-8."""


def topk(case: Ragged, k: int, top_p: float = 0.9, temperature: float = 1.0) -> tuple[torch.Tensor, ...]:
    return selective_topk(case.query, case.candidates, case.offsets, k, top_p, temperature)


def check_against_loops(case: Ragged, k: int, top_p: float, temperature: float, tolerance: float) -> None:
    indices, kept, entropy = topk(case, k, top_p, temperature)
    assert (indices.dtype, kept.dtype) == (torch.int64, torch.int32) and indices.shape == (len(case.query), k)
    for m, (first, last) in enumerate(zip(case.offsets[:-1].tolist(), case.offsets[1:].tolist(), strict=True)):
        wanted, nats = loops.select(case.query[m], case.candidates[first:last], k, top_p, temperature)
        assert indices[m].tolist() == [first + n for n in wanted] + [-1] * (k - len(wanted))
        assert int(kept[m]) == len(wanted)
        assert float(entropy[m]) == pytest.approx(nats, abs=tolerance * 10)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(("top_p", "temperature"), [(0.9, 1.0), (0.9, 0.05), (0.5, 0.3), (1.0, 1.0)])
def test_selection_equals_the_loop(sizes: list[int], top_p: float, temperature: float) -> None:
    for seed in range(5):
        check_against_loops(Ragged.draw(sizes, 4, seed=seed), 4, top_p, temperature, EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_selection_in_short_precision_equals_the_loop_over_the_rounded_inputs(dtype: torch.dtype) -> None:
    """Catches cosines taken in the inputs' own 8 or 11 bits, which swaps neighbours in the order."""
    case = Ragged.draw([40, 3, 25], 8, width=24)
    case.query, case.candidates = case.query.to(dtype), case.candidates.to(dtype)
    check_against_loops(case, 8, 0.9, 0.1, ROUNDED)


def test_a_small_case_by_hand() -> None:
    """Cosines 0, 1, 0.6 and -1 at temperature 0.5: masses 0.084, 0.624, 0.280 and 0.011."""
    candidates = torch.tensor([[0.0, 5.0], [2.0, 0.0], [0.6, 0.8], [-1.0, 0.0]])
    query, offsets = torch.tensor([[3.0, 0.0]]), torch.tensor([0, 4])
    for top_p, wanted in [(0.62, [1]), (0.63, [1, 2]), (0.9, [1, 2]), (0.91, [1, 2, 0]), (0.99, [1, 2, 0, 3])]:
        indices, kept, _ = selective_topk(query, candidates, offsets, 4, top_p, 0.5)
        assert indices[0].tolist() == wanted + [-1] * (4 - len(wanted)) and kept.tolist() == [len(wanted)]


@pytest.mark.parametrize(
    ("top_p", "kept"), [(1e-6, 1), (0.24, 1), (0.26, 2), (0.49, 2), (0.51, 3), (0.76, 4), (1.0, 4)]
)
def test_the_prefix_ends_where_its_mass_reaches_top_p(top_p: float, kept: int) -> None:
    """Four equal candidates have mass 1/4 each; equal ones are taken from the lowest row."""
    indices, count, _ = selective_topk(torch.ones(1, 3), torch.ones(4, 3), torch.tensor([0, 4]), 4, top_p, 1.0)
    assert indices[0].tolist() == [*range(kept), *[-1] * (4 - kept)] and count.tolist() == [kept]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_duplicated_rows_are_taken_from_the_lowest(dtype: torch.dtype) -> None:
    """Copies of three rows among others, and the same row in another segment, which must not be mixed in."""
    case = Ragged.draw([60, 60], 12, width=33)
    rows = case.candidates.to(dtype)
    best = rows[torch.argsort(candidate_cosines(case.query[:1], rows[:60].double(), torch.tensor([0, 60])))[-3:]]
    for copy, row in enumerate(best):
        rows[[5 + copy, 17 + copy, 31 + copy, 50 + copy, 70 + copy]] = row
    case.query, case.candidates = case.query.to(dtype), rows
    check_against_loops(case, 12, 1.0, 1.0, EXACT if dtype == torch.float64 else ROUNDED)


def test_one_candidate_is_always_kept() -> None:
    case = Ragged.draw([1, 1], 3)
    indices, kept, entropy = topk(case, 3, top_p=0.5)
    assert indices.tolist() == [[0, -1, -1], [1, -1, -1]] and kept.tolist() == [1, 1]
    assert entropy.tolist() == pytest.approx([0, 0], abs=EXACT)


@pytest.mark.parametrize("sizes", [[], [0], [0, 0, 0]])
def test_nothing_to_select_from(sizes: list[int]) -> None:
    case = Ragged.draw(sizes, 3)
    indices, kept, entropy = topk(case, 3)
    assert indices.tolist() == [[-1] * 3] * len(sizes)
    assert kept.tolist() == [0] * len(sizes) and kept.dtype == torch.int32
    assert entropy.tolist() == [0] * len(sizes)


def test_an_empty_segment_among_others_has_no_entropy_and_no_nan() -> None:
    _, kept, entropy = topk(Ragged.draw([3, 0, 4], 2), 2)
    assert kept[1] == 0 and entropy[1] == 0 and entropy.isfinite().all()


def test_equal_candidates_have_the_entropy_of_their_number() -> None:
    offsets = torch.tensor([0, 5, 13])
    _, _, entropy = selective_topk(torch.ones(2, 4), torch.ones(13, 4), offsets, 3, 0.9, 0.01)
    assert entropy.tolist() == pytest.approx([math.log(5), math.log(8)], rel=ROUNDED)


def test_a_small_temperature_does_not_overflow() -> None:
    """exp(cosine / temperature) would be e^1000000; the best row has all the mass then."""
    case = Ragged.draw([9, 4], 4)
    indices, kept, entropy = topk(case, 4, temperature=1e-6)
    cosines = [[loops.cosine(row, q) for row in case.candidates] for q in case.query]
    assert kept.tolist() == [1, 1] and entropy.isfinite().all()
    assert indices[:, 0].tolist() == [
        max(range(9), key=cosines[0].__getitem__),
        max(range(9, 13), key=cosines[1].__getitem__),
    ]


def test_zero_rows_have_cosine_zero() -> None:
    case = Ragged.draw([4, 3], 2)
    case.candidates[1] = 0
    case.candidates[2] = 1e-12
    case.query[1] = 0
    cosines = candidate_cosines(case.query, case.candidates, case.offsets)
    assert cosines[[1, 2, 4, 5, 6]].tolist() == [0] * 5
    assert (cosines[[0, 3]].abs() > 1e-3).all()
    check_against_loops(case, 2, 0.9, 1.0, EXACT)


@pytest.mark.parametrize("sizes", SIZES)
def test_cosines_equal_the_loop(sizes: list[int]) -> None:
    case = Ragged.draw(sizes, 2)
    segment = segment_of_rows(case.offsets, len(case.candidates)).tolist()
    wanted = [loops.cosine(row, case.query[m]) for row, m in zip(case.candidates, segment, strict=True)]
    assert candidate_cosines(case.query, case.candidates, case.offsets).tolist() == pytest.approx(wanted, abs=EXACT)


@pytest.mark.parametrize("sizes", [*SIZES, [], [0], [0, 0, 4]])
def test_segment_of_rows_counts_the_segments_out(sizes: list[int]) -> None:
    offsets = torch.tensor([sum(sizes[:m]) for m in range(len(sizes) + 1)])
    wanted = [m for m, size in enumerate(sizes) for _ in range(size)]
    assert segment_of_rows(offsets, sum(sizes)).tolist() == wanted


def test_pooling_averages_runs_of_unequal_length() -> None:
    features = torch.randn(20, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    runs = [[3, 4, 5], [6], [19], [0, 1]]
    rows = torch.tensor([run + [0] * (3 - len(run)) for run in runs])
    weights = torch.tensor([[1 / len(run)] * len(run) + [0.0] * (3 - len(run)) for run in runs])
    pooled = pool_candidates(features, rows, weights)
    # 1e-7: the weights are float32
    torch.testing.assert_close(pooled, torch.stack([features[run].mean(0) for run in runs]), atol=1e-7, rtol=1e-7)


def test_pooling_adds_up_in_float32_and_rounds_once() -> None:
    """256 + 1 + 1 + 1 stays 256 in bf16, whose spacing there is 2; the mean of the four is 64.75 and rounds to 65."""
    features = torch.tensor([[256.0], [1.0], [1.0], [1.0]], dtype=torch.bfloat16)
    pooled = pool_candidates(features, torch.tensor([[0, 1, 2, 3]]), torch.full((1, 4), 0.25))
    assert pooled.dtype == torch.bfloat16 and pooled.item() == torch.tensor(64.75).bfloat16().item() != 64


def test_runs_of_one_are_taken_as_they_are() -> None:
    features = torch.randn(6, 3).bfloat16()
    assert torch.equal(pool_candidates(features, torch.tensor([[4], [0]]), torch.ones(2, 1)), features[[4, 0]])


@pytest.mark.parametrize("run", [1, 3])
def test_no_candidates_pool_to_no_rows(run: int) -> None:
    pooled = pool_candidates(torch.ones(4, 3), torch.empty(0, run, dtype=torch.int64), torch.empty(0, run))
    assert pooled.shape == (0, 3)
