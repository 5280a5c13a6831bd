"""Selection and the selective-feature loss in plain PyTorch: the one truth that faster versions are tested against.

Letters: M segments, P candidates of a segment, N candidates in all, K latent slots of a segment, S slots, D features.
Nothing here reads a device value from Python, and every sum is taken in float32 (float64 for float64 inputs).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

EPSILON = 1e-8
"""A shorter vector counts as zero: its cosine with anything is 0."""


def pool_candidates(features: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """Average runs of patch features to candidates (paper: grouping of helper patches).

    features [F, D]; rows [N, R] int64; weights [N, R] float32 with 0 past the end of a run. Returns [N, D] in the
    dtype of features.
    """
    if rows.shape[1] == 1:
        return features[rows[:, 0]]
    gathered = features[rows.flatten()].view(*rows.shape, features.shape[1])
    return torch.einsum("nr,nrd->nd", weights.to(_compute(features)), gathered.to(_compute(features))).to(
        features.dtype
    )


def segment_of_rows(offsets: Tensor, num_rows: int) -> Tensor:
    """The segment of each candidate row: [N] int64 from offsets [M + 1] (0 first, N last)."""
    rows = torch.arange(num_rows, device=offsets.device)
    return torch.searchsorted(offsets, rows, right=True) - 1  # of offsets[1:], torch.compile drops the "1:" on a GPU


def candidate_cosines(query: Tensor, candidates: Tensor, offsets: Tensor) -> Tensor:
    """Cosine of every candidate with the query of its segment: query [M, D], candidates [N, D] -> [N]."""
    segment = segment_of_rows(offsets, len(candidates))
    cosine: Tensor = (unit(candidates) * unit(query)[segment]).sum(-1)
    return cosine


def selective_topk(
    query: Tensor,
    candidates: Tensor,
    candidate_offsets: Tensor,
    k: int,
    top_p: float,
    temperature: float,
    pool: Tensor | None = None,
    score: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Pick the candidates of each segment that matter for its query.

    p = softmax(cosine / temperature) over the segment; in descending order (ties: the lower row first) the smallest
    prefix whose mass reaches `top_p`, at most `k` candidates.

    query [M, D]; candidates [N, D], where candidate_offsets[m] to candidate_offsets[m + 1] are the rows of segment m.
    pool [N] bool: only these rows are picked, and p is over them alone. score [N] takes the place of the cosines.
    Returns indices [M, k] int64 rows of candidates, -1 where not kept; kept [M] int32; entropy [M] of p in nats.
    """
    M, N = len(query), len(candidates)
    if M == 0 or N == 0:
        empty = candidate_offsets.new_full((M, k), -1)
        return empty, empty.new_zeros(M, dtype=torch.int32), query.new_zeros(M, dtype=_compute(query))
    segment = segment_of_rows(candidate_offsets, N)
    inside = torch.ones(N, dtype=torch.bool, device=query.device) if pool is None else pool
    if score is None:
        score = candidate_cosines(query, candidates, candidate_offsets)
    score = score.to(_compute(candidates)).masked_fill(~inside, -torch.inf)
    logit = score / temperature
    highest = logit.new_full((M,), -torch.inf).scatter_reduce(0, segment, logit, "amax")
    shifted = torch.where(inside, logit - highest[segment], -torch.inf)
    log_mass = logit.new_zeros(M).index_add(0, segment, shifted.exp()).log()
    log_p = torch.where(inside, shifted - log_mass[segment], -torch.inf)
    moment = torch.where(inside, log_p.exp() * log_p, 0)
    entropy = -logit.new_zeros(M).index_add(0, segment, moment)

    ranked = rank_in_segments(score, segment)
    place = candidate_offsets[:-1, None] + torch.arange(k, device=query.device)
    size = candidate_offsets.new_zeros(M).index_add(0, segment, inside.long())
    exists = place < candidate_offsets[:-1, None] + size[:, None]
    top = ranked[place.clamp(max=N - 1)]
    p = torch.where(exists, log_p[top].exp(), 0)
    mass_before = p.cumsum(1) - p
    keep = exists & (mass_before < top_p)
    return torch.where(keep, top, -1), keep.sum(1, dtype=torch.int32), entropy


def rank_in_segments(values: Tensor, segment: Tensor) -> Tensor:
    """Rows [N] segment by segment, each in descending order of `values` [N], of equal ones the lower first."""
    by_value = torch.argsort(values, descending=True, stable=True)
    return by_value[torch.argsort(segment[by_value], stable=True)]


def selective_contrastive_loss(
    prediction: Tensor,
    candidates: Tensor,
    target_index: Tensor,
    segment_of_slot: Tensor,
    candidate_offsets: Tensor,
    selected: Tensor,
    temperature: float,
    negatives: Literal["segment", "all"] = "segment",
    sample_of_segment: Tensor | None = None,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Per slot: 1 - cosine(prediction, target), and InfoNCE of the target against candidates not selected.

    prediction [S, D]; candidates [N, D]; target_index [S] int64 row of the slot's target, -1 where the slot has none
    (both losses are then 0); segment_of_slot [S]; candidate_offsets [M + 1]; selected [M, K] int64 rows, -1 where
    not kept: the selected rows of a slot's own segment are never its negatives. negatives "segment": candidates of the
    same helper image; "all": also all candidates of other samples, where sample_of_segment [M] says which sample a
    segment belongs to (not those of other segments of the same sample: consecutive helper images share most of their
    patches). noise [S, D] is added to the targets. A slot without negatives has contrastive loss 0.
    Returns alignment [S] and contrastive [S], differentiable in `prediction` only.
    """
    N = len(candidates)
    has_target = target_index >= 0
    candidates = candidates.detach()
    if N == 0:
        nothing = prediction.to(_compute(prediction)).sum(-1) * 0
        return nothing, nothing
    target = candidates[target_index.clamp(min=0)].to(_compute(candidates))
    if noise is not None:
        target = target + noise.to(target.dtype)
    z = unit(prediction)
    positive = (z * unit(target)).sum(-1)
    alignment = torch.where(has_target, 1 - positive, 0)

    segment = segment_of_rows(candidate_offsets, N)
    chosen = torch.zeros(N + 1, dtype=torch.bool, device=candidates.device)
    chosen[torch.where(selected >= 0, selected, N).flatten()] = True
    negative = (segment_of_slot[:, None] == segment) & ~chosen[:N]
    if negatives == "all":
        if sample_of_segment is None:
            raise ValueError('negatives "all" needs sample_of_segment')
        sample = sample_of_segment[segment]
        negative |= sample_of_segment[segment_of_slot][:, None] != sample
    logits = (z @ unit(candidates).T / temperature).masked_fill(~negative, -torch.inf)
    positive = positive / temperature
    # -log(e^pos / (e^pos + sum e^neg)); with no negatives the sum is empty and the loss exactly 0
    every = torch.cat([positive[:, None], logits], dim=1).logsumexp(1)
    return alignment, torch.where(has_target & negative.any(1), every - positive, 0)


def _compute(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def unit(rows: Tensor) -> Tensor:
    """Rows scaled to length 1 in float32 (or float64); a zero row stays zero and gets no gradient."""
    rows = rows.to(_compute(rows))
    is_zero = torch.linalg.vector_norm(rows.detach(), dim=-1, keepdim=True) < EPSILON
    length = torch.linalg.vector_norm(torch.where(is_zero, 1, rows), dim=-1, keepdim=True)
    unit: Tensor = torch.where(is_zero, 0, rows / length)
    return unit
