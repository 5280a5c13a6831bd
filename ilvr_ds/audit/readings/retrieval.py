"""Is a latent nearest to the patch that it should stand for?

Every latent with a target is held against the candidates of its own helper image, and against its target among the
candidates of other samples. Ties (equal patches have equal features) are broken at random, and what is returned is what
is then expected, so that a latent that is equally near to everything finds its target by chance alone.

P candidates, D features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ilvr_ds.audit.readings.targets import Chosen

OTHERS = 64
"""Other samples whose candidates are held against."""
TIE = 1e-6
"""Cosines closer than this are equal."""


class Retrieval:
    """Holds latents against candidates; `pool` are those of some samples by number, one more than OTHERS."""

    def __init__(self, pool: Mapping[int, Chosen]) -> None:
        self.pool = pool

    @torch.inference_mode()
    def __call__(self, number: int, latents: Sequence[Tensor], chosen: Chosen) -> dict[str, Any]:
        """Sums over the latents of a sample that have a target: hits in the best 1 and 5, and those of chance."""
        sums: dict[str, Any] = {"latents": 0, "image": [0.0] * 4, "others": [0.0] * 4}
        for m, (candidates, rows) in enumerate(zip(chosen.candidates, chosen.rows, strict=True)):
            if m >= len(latents) or not rows:
                continue
            z = normalize(latents[m].to(candidates.device).float()[: len(rows)], dim=-1)
            unit = normalize(candidates.float(), dim=-1)
            target = unit[list(rows)]
            own = (z * target).sum(-1)
            others = self._others(number, m, candidates)
            sums["latents"] += len(rows)
            for name, cosines in (("image", z @ unit.T), ("others", torch.cat([own[:, None], z @ others.T], dim=1))):
                hits = expected_hits(cosines, own)
                sums[name] = [a + b for a, b in zip(sums[name], hits, strict=True)]
        return sums

    def _others(self, number: int, segment: int, like: Tensor) -> Tensor:
        """[X, D] on the device of `like` [P, D]: of the same segment, or the last, of OTHERS other samples."""
        samples = [chosen for other, chosen in self.pool.items() if other != number and chosen.candidates][:OTHERS]
        rows = [chosen.candidates[min(segment, len(chosen.candidates) - 1)] for chosen in samples]
        return normalize(torch.cat([like[:0], *rows]).float(), dim=-1)


def expected_hits(cosines: Tensor, own: Tensor) -> list[float]:
    """Of latents with `cosines` [S, P] to all candidates, of which `own` [S] are those to the targets (in them too):
    sums of hits in the best 1 and in the best 5, and of the same by chance."""
    better = (cosines > own[:, None] + TIE).sum(1)
    equal = ((cosines - own[:, None]).abs() <= TIE).sum(1).clamp(min=1)
    hits = [((k - better) / equal).clamp(0, 1).sum().item() for k in (1, 5)]
    count = cosines.shape[1]
    return [*hits, *(len(own) * min(1.0, k / count) for k in (1, 5))]
