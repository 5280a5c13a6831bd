"""Among which candidates of each helper image targets are chosen (`selection.pool`).

Letters: M segments of the window, N candidates, E rows of the earlier table, D features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ilvr_ds.config import SelectionConfig
from ilvr_ds.data.window import Before, Candidates, MicroBatch
from ilvr_ds.ops.change import change_at_place, change_to_nearest, most_changed
from ilvr_ds.ops.reference import pool_candidates, segment_of_rows


@dataclass(frozen=True)
class ChoicePool:
    """The candidates to choose among, of a window or of one micro-batch."""

    members: Tensor
    """[N] bool"""
    change: Tensor | None = None
    """[N] float32: 1 - cosine to the picture before. This and what follows: for `selection.pool: changed` only"""
    stands_out: Tensor | None = None
    """[N] bool: it changed by more than most of its picture"""
    unchanged: Tensor | None = None
    """[M] bool: no candidate stands apart, or there is no picture before; all are members, or none is, as
    `selection.unchanged` says"""

    def of(self, micro: MicroBatch) -> ChoicePool:
        """The same for one micro-batch."""
        if self.change is None or self.stands_out is None or self.unchanged is None:
            return ChoicePool(self.members[micro.candidate_rows])
        change, stands_out = self.change[micro.candidate_rows], self.stands_out[micro.candidate_rows]
        return ChoicePool(self.members[micro.candidate_rows], change, stands_out, self.unchanged[micro.segments])


@torch.no_grad()
def find_pool(
    features: Tensor, where: Candidates, candidates: Tensor, settings: SelectionConfig, k: int
) -> ChoicePool | None:
    """The pool of a window; None where all candidates are in it, by the published rule.

    features [F, D]: merged image features of the window; candidates [N, D]: of its helper images, pooled by `where`.
    """
    if settings.pool == "region":
        assert where.in_region is not None, "collate with regions"
        return ChoicePool(where.in_region)
    if settings.pool == "changed":
        assert where.before is not None, "collate for a pool of what changed"
        change = change_from_before(features, where.before, candidates)
        found = most_changed(change, where.offsets, settings.pool_min, settings.pool_limit(k))
        members = found.members
        if settings.unchanged == "none":
            members = members & ~found.unchanged[segment_of_rows(where.offsets, len(change))]
        return ChoicePool(members, change, found.stands_out, found.unchanged)
    return None


def change_from_before(features: Tensor, before: Before, candidates: Tensor) -> Tensor:
    """1 - cosine of each candidate to the picture before: [N] float32, 0 where there is none."""
    inputs = pool_candidates(features, before.input_rows, before.input_weights)
    earlier = torch.cat([candidates, inputs])
    change = change_at_place(candidates, earlier, before.place)
    for first, last, start, stop in before.searches:
        # one by one, so that no bit of the product depends on what else is in the window
        change[first:last] = change_to_nearest(candidates[first:last], earlier[before.earlier[start:stop]])
    return change
