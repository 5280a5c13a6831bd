"""Which candidates of each helper image matter. By the query: sequential over a sample's segments, parallel over
samples. By change alone: all segments at once.

Letters: M segments of the window, N candidates, K latent slots, D features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ilvr_ds.config import SelectionConfig
from ilvr_ds.data.window import MicroBatch, QueryContext
from ilvr_ds.distill.pool import ChoicePool
from ilvr_ds.distill.query import Context
from ilvr_ds.ops.reference import candidate_cosines, segment_of_rows
from ilvr_ds.ops.selective_topk import selective_topk


@dataclass(frozen=True)
class Targets:
    """What was selected, for a window or for one micro-batch."""

    candidates: Tensor
    """[N, D] in the model's dtype"""
    offsets: Tensor
    """[M + 1] int64: candidates of segment m are rows offsets[m] to offsets[m + 1]"""
    indices: Tensor
    """[M, K] int64 rows of candidates, by `selection.order`; -1 where not kept, behind all others"""
    kept: Tensor
    """[M] int32"""
    entropy: Tensor
    """[M] float32, nats"""
    query: Tensor | None
    """[M, D] float32; None where change alone decides"""
    pool: ChoicePool | None = None
    """The candidates that were chosen among; None: all"""

    def of(self, micro: MicroBatch) -> Targets:
        """The same for one micro-batch, with rows counted within the micro-batch."""
        shift = micro.candidate_offsets[:-1] - self.offsets[micro.segments]
        indices = self.indices[micro.segments]
        return Targets(
            candidates=self.candidates[micro.candidate_rows],
            offsets=micro.candidate_offsets,
            indices=torch.where(indices >= 0, indices + shift[:, None], -1),
            kept=self.kept[micro.segments],
            entropy=self.entropy[micro.segments],
            query=self.query[micro.segments] if self.query is not None else None,
            pool=self.pool.of(micro) if self.pool else None,
        )

    def values(self) -> Tensor:
        """The selected features [M, K, D]; rows of slots without a target are arbitrary."""
        if len(self.candidates) == 0:
            return self.candidates.new_zeros(*self.indices.shape, self.candidates.shape[1])
        return self.candidates[self.indices.clamp(min=0)]


@torch.no_grad()
def select_targets(
    context: Context,
    plan: QueryContext,
    candidates: Tensor,
    offsets: Tensor,
    settings: SelectionConfig,
    k: int,
    pool: ChoicePool | None = None,
) -> Targets:
    """Select round by round: query = mean of user context, text before the segment and what was selected just before.

    pool: the candidates to choose among; None: all. The number of rounds is known on the CPU; a rank with fewer rounds
    makes fewer launches and no fewer collectives.
    """
    M = len(plan.sample)
    indices = torch.full((M, k), -1, dtype=torch.int64, device=candidates.device)
    kept = torch.zeros(M, dtype=torch.int32, device=candidates.device)
    entropy = torch.zeros(M, dtype=torch.float32, device=candidates.device)
    queries = context.step.new_zeros(M, candidates.shape[1])
    selected_mean = context.step.new_zeros(M, candidates.shape[1])
    for start, stop, first, last in plan.rounds:
        now = slice(start, stop)
        queries[now] = _queries(context, plan, selected_mean, now)
        here, bounds = candidates[first:last], offsets[start : stop + 1] - first
        members = pool.members[first:last] if pool else None
        score = None
        if pool and settings.by == "change":
            score = _change_or_cosine(pool, queries[now], here, bounds, now, slice(first, last))
        top, kept[now], entropy[now] = selective_topk(
            queries[now], here, bounds, k, settings.top_p, settings.temperature, members, score
        )
        if settings.order == "place":
            top = _by_place(top, last - first)
        is_kept = top >= 0
        indices[now] = torch.where(is_kept, top + first, -1)
        picked = here[top.clamp(min=0)].float()
        selected_mean[now] = torch.einsum("mkd,mk->md", picked, is_kept.float()) / kept[now, None].clamp(min=1)
    return Targets(candidates, offsets, indices, kept, entropy, queries, pool)


@torch.no_grad()
def select_by_change(
    candidates: Tensor, offsets: Tensor, settings: SelectionConfig, k: int, pool: ChoicePool
) -> Targets:
    """Select what changed most; a segment whose pool is empty has no target. Nothing depends on weights or on other
    segments, and what is selected is what `select_targets` selects by change, to the last bit."""
    assert pool.change is not None
    M, D = len(offsets) - 1, candidates.shape[1]
    unread = candidates.new_zeros(M, D, dtype=torch.float32)  # the score takes the place of cosines to a query
    rows, kept, entropy = selective_topk(
        unread, candidates, offsets, k, settings.top_p, settings.temperature, pool.members, pool.change
    )
    if settings.order == "place":
        rows = _by_place(rows, len(candidates))
    return Targets(candidates, offsets, rows, kept, entropy, None, pool)


def _by_place(rows: Tensor, count: int) -> Tensor:
    """Rows [m, K] of `count` in ascending order, -1 behind them."""
    ordered = torch.where(rows >= 0, rows, count).sort(dim=1).values
    return torch.where(ordered < count, ordered, -1)


def _change_or_cosine(
    pool: ChoicePool, query: Tensor, candidates: Tensor, offsets: Tensor, now: slice, rows: slice
) -> Tensor:
    """[n]: how much each candidate of a round changed; in pictures that did not change, its cosine to the query."""
    assert pool.change is not None and pool.unchanged is not None
    is_still = pool.unchanged[now][segment_of_rows(offsets, len(candidates))]
    cosine = candidate_cosines(query, candidates, offsets)
    return torch.where(is_still, cosine, pool.change[rows].to(cosine.dtype))


def _queries(context: Context, plan: QueryContext, selected_mean: Tensor, now: slice) -> Tensor:
    """Mean of the parts that exist: [m, D] float32."""
    has_step = context.has_step[now].float()[:, None]
    has_previous = plan.has_previous[now].float()[:, None]
    total = context.user[plan.sample[now]] + context.step[now] * has_step
    total = total + selected_mean[plan.previous[now]] * has_previous
    return total / (1 + has_step + has_previous)
