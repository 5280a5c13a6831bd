"""From the image features of a window to its targets."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ilvr_ds.config import SelectionConfig
from ilvr_ds.data.window import Window
from ilvr_ds.distill.pool import find_pool
from ilvr_ds.distill.query import Context
from ilvr_ds.distill.selection import Targets, select_by_change, select_targets
from ilvr_ds.ops.reference import pool_candidates


@dataclass(frozen=True)
class Selector:
    """Selects as a recipe says. It knows no weights: what depends on them is the context that a teacher reads."""

    settings: SelectionConfig
    latent_size: int
    """Latent slots of a segment (K)"""
    width: int
    """Features of a candidate (D); a row of image features may hold more"""

    @torch.no_grad()
    def __call__(self, window: Window, features: Tensor, context: Context | None) -> Targets:
        """Targets of the whole window.

        features [F, D or more]: its image features. context: what the teacher reads in it; None where the settings ask
        for no query.
        """
        where, settings, k = window.candidates, self.settings, self.latent_size
        features = features[:, : self.width]
        candidates = pool_candidates(features, where.rows, where.weights)
        pool = find_pool(features, where, candidates, settings, k)
        if settings.needs_query:
            assert context is not None, "read the window with a teacher"
            return select_targets(context, window.context, candidates, where.offsets, settings, k, pool)
        assert pool is not None, "the recipe's check lets no other pool through"
        return select_by_change(candidates, where.offsets, settings, k, pool)
