"""The selective-feature loss over tiles of candidates: `reference.selective_contrastive_loss`, fast on GPUs."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ilvr_ds.ops import reference
from ilvr_ds.ops.arguments import FLOATS, INDEX, Arguments, check_offsets, check_range, readable
from ilvr_ds.ops.build import use_native, when_loaded


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
    """As `reference.selective_contrastive_loss`, which says what is computed; on a GPU without the [S, N] matrix in
    memory.

    prediction and candidates have the same dtype. The reference computes on a CPU and in float64. Fastest with slots in
    the order of their segments. Raises TypeError, ValueError or IndexError that names the argument; values of tensors
    on a GPU are checked there, and a bad one stops the program as PyTorch's own device asserts do.
    """
    arguments = Arguments("prediction", prediction)
    arguments.check("prediction", prediction, "S D", FLOATS)
    arguments.check("candidates", candidates, "N D", (prediction.dtype,))
    arguments.check("target_index", target_index, "S", INDEX)
    arguments.check("segment_of_slot", segment_of_slot, "S", INDEX)
    arguments.check("candidate_offsets", candidate_offsets, "M+1", INDEX)
    arguments.check("selected", selected, "R K", INDEX)
    if negatives not in ("segment", "all"):
        raise ValueError(f'negatives = {negatives!r}: expected "segment" or "all"')
    if sample_of_segment is not None:
        arguments.check("sample_of_segment", sample_of_segment, "M", INDEX)
    elif negatives == "all":
        raise ValueError('negatives "all" needs sample_of_segment')
    if noise is not None:
        arguments.check("noise", noise, "S D", FLOATS)
    if not temperature > 0:
        raise ValueError(f"temperature = {temperature}: expected more than 0")
    if readable(prediction):
        N = len(candidates)
        check_offsets(candidate_offsets, N)
        check_range("target_index", target_index, -1, N)
        check_range("selected", selected, -1, N)
        check_range("segment_of_slot", segment_of_slot, 0, len(candidate_offsets) - 1)
    if prediction.dtype == torch.float64 or not use_native(prediction.device.type):
        return reference.selective_contrastive_loss(
            prediction, candidates, target_index, segment_of_slot, candidate_offsets, selected, temperature,
            negatives, sample_of_segment, noise,
        )  # fmt: skip
    samples = sample_of_segment if negatives == "all" else None
    alignment, contrastive, _, _ = torch.ops.ilvr_ds.selective_contrastive(
        prediction, candidates, target_index, segment_of_slot, candidate_offsets, selected, temperature, samples, noise
    )
    return alignment, contrastive


@when_loaded
def _register() -> None:
    torch.library.register_fake("ilvr_ds::selective_contrastive")(_fake_forward)
    torch.library.register_fake("ilvr_ds::selective_contrastive_backward")(_fake_backward)


def _fake_forward(
    prediction: Tensor, candidates: Tensor, target_index: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    S = prediction.shape[0]
    losses = prediction.new_empty(S, dtype=torch.float32)
    rows = target_index.new_empty(candidates.shape[0], dtype=torch.int32)
    return losses, torch.empty_like(losses), losses.new_empty(S, 4), rows


def _fake_backward(grad_alignment: Tensor, grad_contrastive: Tensor, prediction: Tensor, *_: Any) -> Tensor:
    return prediction.new_empty(prediction.shape)
