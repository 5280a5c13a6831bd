from __future__ import annotations

import dataclasses
import math
from itertools import accumulate
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from ilvr_ds.config import SelectionConfig
from ilvr_ds.data.window import QueryContext, Round
from ilvr_ds.distill.pool import ChoicePool
from ilvr_ds.distill.query import Context
from ilvr_ds.distill.selection import Targets, select_targets

D = 6
SEGMENTS = [3, 0, 1, 4]
"""Of each sample."""
ORDER = [(i, m) for m in range(max(SEGMENTS)) for i, count in enumerate(SEGMENTS) if m < count]
"""Segments round by round, as (sample, number in the sample)."""
WHERE = {segment: number for number, segment in enumerate(ORDER)}


@dataclasses.dataclass
class Case:
    """Random segments of 1 to 12 candidates, some with text before them."""

    context: Context
    plan: QueryContext
    candidates: Tensor
    offsets: list[int]

    @staticmethod
    def draw(seed: int) -> Case:
        generator = torch.Generator().manual_seed(seed)
        sizes = torch.randint(1, 13, (len(ORDER),), generator=generator).tolist()
        offsets = list(accumulate(sizes, initial=0))
        has_step = torch.rand(len(ORDER), generator=generator) < 0.6
        step = torch.randn(len(ORDER), D, generator=generator) * has_step[:, None]
        context = Context(torch.randn(len(SEGMENTS), D, generator=generator), step, has_step)
        candidates = torch.randn(offsets[-1], D, generator=generator)
        return Case(context, plan_of(ORDER, offsets), candidates, offsets)

    def select(self, settings: SelectionConfig, k: int) -> Targets:
        return select_targets(self.context, self.plan, self.candidates, torch.tensor(self.offsets), settings, k)


def plan_of(order: list[tuple[int, int]], offsets: list[int]) -> QueryContext:
    rounds = []
    for m in sorted({m for _, m in order}):
        numbers = [number for number, segment in enumerate(order) if segment[1] == m]
        start, stop = numbers[0], numbers[-1] + 1
        rounds.append(Round(start, stop, offsets[start], offsets[stop]))
    unused = dict.fromkeys(("prompt", "prompt_mask", "image", "image_mask", "step", "step_mask"), torch.empty(0))
    return QueryContext(
        **unused,
        sample=torch.tensor([i for i, _ in order], dtype=torch.int64),
        previous=torch.tensor([WHERE.get((i, m - 1), WHERE[i, m]) for i, m in order], dtype=torch.int64),
        has_previous=torch.tensor([m > 0 for _, m in order], dtype=torch.bool),
        rounds=tuple(rounds),
    )


def one_by_one(
    case: Case, top_p: float, temperature: float, k: int, pool: ChoicePool | None = None, by: str = "query"
) -> dict[int, tuple[list[int], float, Tensor]]:
    """Kept rows, entropy and query of each segment: sample by sample, segment by segment, in float64."""
    result = {}
    for sample, count in enumerate(SEGMENTS):
        before = None
        for m in range(count):
            number = WHERE[sample, m]
            parts = [case.context.user[sample].double()]
            if case.context.has_step[number]:
                parts.append(case.context.step[number].double())
            if before is not None:
                parts.append(before)
            query = torch.stack(parts).mean(0)
            here = slice(case.offsets[number], case.offsets[number + 1])
            candidates = case.candidates[here].double()
            scores = [float(query @ c / query.norm() / c.norm()) for c in candidates]
            if pool and by == "change" and not pool.unchanged[number]:
                scores = pool.change[here].tolist()
            inside = pool.members[here].tolist() if pool else [True] * len(scores)
            exponentials = [math.exp(s / temperature) * x for s, x in zip(scores, inside, strict=True)]
            p = [e / sum(exponentials) for e in exponentials]
            kept: list[int] = []
            for row in sorted(range(len(p)), key=lambda row: (-p[row], row)):
                if len(kept) == k or not inside[row] or sum(p[r] for r in kept) >= top_p:
                    break
                kept.append(row)
            before = candidates[kept].mean(0)
            entropy = -math.fsum(x * math.log(x) for x in p if x)
            result[number] = [row + case.offsets[number] for row in kept], entropy, query
    return result


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("top_p", "temperature", "k"), [(0.9, 1.0, 4), (0.9, 0.1, 4), (0.5, 0.3, 16), (1.0, 1.0, 16), (0.9, 0.05, 1)]
)
def test_rounds_select_what_a_loop_over_samples_selects(seed: int, top_p: float, temperature: float, k: int) -> None:
    case = Case.draw(seed)
    targets = case.select(SelectionConfig(top_p=top_p, temperature=temperature), k)
    for number, (rows, entropy, query) in one_by_one(case, top_p, temperature, k).items():
        assert targets.indices[number].tolist() == rows + [-1] * (k - len(rows))
        assert targets.kept[number] == len(rows)
        # float32 against float64
        assert float(targets.entropy[number]) == pytest.approx(entropy, rel=1e-5, abs=1e-5)
        torch.testing.assert_close(targets.query[number].double(), query, rtol=1e-5, atol=1e-6)


def test_by_place_the_same_stand_in_the_order_of_the_picture() -> None:
    """Catches empty slots before full ones, and queries that depend on the order."""
    case = Case.draw(0)
    by_score = case.select(SelectionConfig(top_p=0.5, temperature=0.3), 6)
    by_place = case.select(SelectionConfig(top_p=0.5, temperature=0.3, order="place"), 6)
    assert (by_score.kept < 6).any() and (by_score.kept > 1).any()
    for scored, placed, kept in zip(by_score.indices.tolist(), by_place.indices.tolist(), by_score.kept, strict=True):
        assert placed == sorted(scored[:kept]) + [-1] * (6 - kept)
    assert by_place.indices.tolist() != by_score.indices.tolist()
    torch.testing.assert_close(by_place.query, by_score.query)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("by", ["query", "change"])
@pytest.mark.parametrize(("top_p", "temperature", "k"), [(0.9, 1.0, 4), (0.7, 0.1, 3)])
def test_rounds_select_within_a_pool_what_a_loop_selects(
    seed: int, by: Literal["query", "change"], top_p: float, temperature: float, k: int
) -> None:
    """Catches pools of the round beside, and a picture without change that is not selected over all by the query."""
    case = Case.draw(seed)
    generator = torch.Generator().manual_seed(seed)
    rows, offsets = case.offsets[-1], torch.tensor(case.offsets)
    unchanged = torch.rand(len(ORDER), generator=generator) < 0.3
    members = torch.rand(rows, generator=generator) < 0.5
    members[offsets[:-1]] = True
    members |= unchanged.repeat_interleave(offsets.diff())
    pool = ChoicePool(members, torch.rand(rows, generator=generator), members, unchanged)
    settings = SelectionConfig(top_p=top_p, temperature=temperature, pool="changed", by=by)
    targets = select_targets(case.context, case.plan, case.candidates, offsets, settings, k, pool)
    for number, (kept, entropy, query) in one_by_one(case, top_p, temperature, k, pool, by).items():
        assert targets.indices[number].tolist() == kept + [-1] * (k - len(kept))
        assert float(targets.entropy[number]) == pytest.approx(entropy, rel=1e-5, abs=1e-5)
        torch.testing.assert_close(targets.query[number].double(), query, rtol=1e-5, atol=1e-6)


def test_what_was_selected_before_changes_the_query() -> None:
    case = Case.draw(0)
    first = case.select(SelectionConfig(temperature=0.1), 4)
    changed = dataclasses.replace(case, candidates=case.candidates.clone())
    changed.candidates[: case.offsets[len(SEGMENTS) - 1]] *= -1
    second = changed.select(SelectionConfig(temperature=0.1), 4)
    opening = [WHERE[i, 0] for i in (0, 2, 3)]
    assert torch.equal(first.query[opening], second.query[opening])
    assert not torch.isclose(first.query[WHERE[0, 1]], second.query[WHERE[0, 1]]).all()


def test_a_window_without_segments_has_no_targets() -> None:
    context = Context(torch.zeros(2, D), torch.zeros(0, D), torch.zeros(0, dtype=torch.bool))
    candidates = torch.zeros(0, D, dtype=torch.bfloat16)
    targets = select_targets(context, plan_of([], [0]), candidates, torch.tensor([0]), SelectionConfig(), 4)
    assert targets.indices.shape == (0, 4) and targets.query.shape == (0, D)
    assert targets.values().shape == (0, 4, D)


@pytest.fixture
def whole() -> Targets:
    """Three segments of 3, 2 and 4 candidates; the second kept only one."""
    return Targets(
        candidates=torch.arange(9.0)[:, None].repeat(1, 2),
        offsets=torch.tensor([0, 3, 5, 9]),
        indices=torch.tensor([[2, 0], [4, -1], [5, 8]]),
        kept=torch.tensor([2, 1, 2], dtype=torch.int32),
        entropy=torch.tensor([0.1, 0.2, 0.3]),
        query=torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]),
    )


def part(segments: list[int], rows: list[int], offsets: list[int]) -> Any:
    """The fields of a MicroBatch that count here."""
    return SimpleNamespace(
        segments=torch.tensor(segments, dtype=torch.int64),
        candidate_rows=torch.tensor(rows, dtype=torch.int64),
        candidate_offsets=torch.tensor(offsets),
    )


def test_a_micro_batch_counts_its_own_rows(whole: Targets) -> None:
    ends = whole.of(part([0, 2], [0, 1, 2, 5, 6, 7, 8], [0, 3, 7]))
    assert ends.indices.tolist() == [[2, 0], [3, 6]]
    assert ends.values()[..., 0].tolist() == [[2.0, 0.0], [5.0, 8.0]]
    assert (ends.kept.tolist(), ends.query[:, 0].tolist()) == ([2, 2], [1.0, 3.0])
    assert ends.entropy.tolist() == whole.entropy[[0, 2]].tolist()


def test_a_micro_batch_has_its_part_of_the_pool(whole: Targets) -> None:
    rows = torch.arange(9)
    pool = ChoicePool(rows % 2 == 0, rows.float(), rows % 3 == 0, torch.tensor([False, True, False]))
    found = dataclasses.replace(whole, pool=pool).of(part([1, 2], [3, 4, 5, 6, 7, 8], [0, 2, 6])).pool
    assert found is not None and found.change is not None and found.unchanged is not None
    assert found.change.tolist() == [3, 4, 5, 6, 7, 8] and found.unchanged.tolist() == [True, False]
    assert found.members.tolist() == [False, True, False, True, False, True]
    region = dataclasses.replace(whole, pool=ChoicePool(pool.members)).of(part([0], [0, 1, 2], [0, 3])).pool
    assert region is not None and region.members.tolist() == [True, False, True] and region.change is None


def test_slots_without_a_target_stay_without_one(whole: Targets) -> None:
    assert whole.of(part([1], [3, 4], [0, 2])).indices.tolist() == [[1, -1]]


def test_a_micro_batch_without_segments_is_empty(whole: Targets) -> None:
    nothing = whole.of(part([], [], [0]))
    assert nothing.indices.shape == (0, 2) and nothing.values().shape == (0, 2, 2)
