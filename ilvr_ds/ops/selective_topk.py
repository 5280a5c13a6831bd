"""Adaptive selection in one pass over the candidates: `reference.selective_topk`, fast on GPUs."""

from __future__ import annotations

import torch
from torch import Tensor

from ilvr_ds.ops import reference
from ilvr_ds.ops.arguments import FLOATS, INDEX, Arguments, check_offsets, readable
from ilvr_ds.ops.build import use_native, when_loaded

MOST_ON_GPU = 1024
"""The largest k on a GPU, where one block ranks a segment in shared memory."""


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
    """As `reference.selective_topk`, which says what is computed; never synchronises with a GPU.

    The reference computes on a CPU and in float64. Raises TypeError, ValueError or IndexError that names the argument;
    values of tensors on a GPU are checked there, and a bad one stops the program as PyTorch's own device asserts do.
    """
    arguments = Arguments("query", query)
    arguments.check("query", query, "M D", FLOATS)
    arguments.check("candidates", candidates, "N D", FLOATS)
    arguments.check("candidate_offsets", candidate_offsets, "M+1", INDEX)
    if pool is not None:
        arguments.check("pool", pool, "N", (torch.bool,))
    if score is not None:
        arguments.check("score", score, "N", FLOATS)
    on_gpu = query.device.type == "cuda"
    if k < 0 or (on_gpu and k > MOST_ON_GPU):
        raise ValueError(f"k = {k}: expected 0 to {MOST_ON_GPU}" if on_gpu else f"k = {k}: expected 0 or more")
    if not temperature > 0:
        raise ValueError(f"temperature = {temperature}: expected more than 0")
    if readable(candidate_offsets):
        check_offsets(candidate_offsets, len(candidates))
    if torch.float64 in (query.dtype, candidates.dtype) or not use_native(query.device.type):
        return reference.selective_topk(query, candidates, candidate_offsets, k, top_p, temperature, pool, score)
    chosen: tuple[Tensor, Tensor, Tensor] = torch.ops.ilvr_ds.selective_topk(
        query, candidates, candidate_offsets, k, top_p, temperature, pool, score
    )
    return chosen


@when_loaded
def _register() -> None:
    torch.library.register_fake("ilvr_ds::selective_topk")(_fake)


def _fake(
    query: Tensor,
    candidates: Tensor,
    offsets: Tensor,
    k: int,
    top_p: float,
    temperature: float,
    pool: Tensor | None = None,
    score: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    M = query.shape[0]
    entropy = candidates.new_empty(M, dtype=torch.float32)
    return offsets.new_empty(M, k), offsets.new_empty(M, dtype=torch.int32), entropy
