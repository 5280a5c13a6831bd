"""The head with its cross-entropy, chunk by chunk: logits of a few supervised tokens at a time, never of all.

One module call whatever the number of chunks, so that ZeRO-3 gathers the head's weight once and all ranks stay in step.

Letters: L supervised tokens, C of a chunk, D, V entries of the vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear


class LossHead(nn.Linear):
    """Takes the place of the stock head (`use_loss_head`), with the same weight under the same name."""

    sums_in_fp32: bool = True
    """The gradient of a weight in 16 bit is added up in float32 over chunks: 4 V D bytes, where there are several."""

    def forward(self, hidden: Tensor, labels: Tensor | None = None, chunk: int = 0) -> Any:
        """Logits [L, V] of hidden states [L, D]; with labels [L] the cross-entropy [L] float32 and the most probable
        token [L] int64 of each, `chunk` tokens at a time."""
        if labels is None:
            return super().forward(hidden)
        sums = torch.promote_types(self.weight.dtype, torch.float32) if self.sums_in_fp32 else self.weight.dtype
        return _ChunkedCrossEntropy.apply(hidden, self.weight, labels, chunk, sums)  # type: ignore[no-untyped-call]


def use_loss_head(model: Any, sums_in_fp32: bool = True) -> None:
    """Replace the model's head by a loss head with the same weight, sharded or tied as it may be."""
    head = LossHead(model.lm_head.in_features, model.lm_head.out_features, bias=False, device="meta")
    head.weight = model.lm_head.weight
    head.sums_in_fp32 = sums_in_fp32
    model.lm_head = head


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Saves hidden states and losses; the backward recomputes the logits, chunk by chunk."""

    @staticmethod
    def forward(
        context: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int, sums: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        best = torch.empty(len(hidden), dtype=torch.int64, device=hidden.device)
        for rows in _chunks(len(hidden), chunk):
            logits = linear(hidden[rows], weight).float()
            losses[rows] = cross_entropy(logits, labels[rows], reduction="none")
            best[rows] = logits.argmax(-1)
        context.save_for_backward(hidden, weight, labels, losses)
        context.chunk, context.sums = chunk, sums
        context.mark_non_differentiable(best)
        return losses, best

    @staticmethod
    def backward(context: Any, of_losses: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        """d loss / d logits = softmax - one-hot."""
        hidden, weight, labels, losses = context.saved_tensors
        of_hidden = torch.empty_like(hidden) if context.needs_input_grad[0] else None
        of_weight: Tensor | None = None
        chunks = _chunks(len(hidden), context.chunk)
        for rows in chunks:
            logits = linear(hidden[rows], weight).float()
            label = labels[rows, None]
            normaliser = losses[rows, None] + logits.gather(1, label)
            softmax = logits.sub_(normaliser).exp_()
            softmax.scatter_add_(1, label, torch.full_like(normaliser, -1.0))
            of_logits = softmax.mul_(of_losses[rows, None]).to(hidden.dtype)
            if of_hidden is not None:
                torch.mm(of_logits, weight, out=of_hidden[rows])
            if not context.needs_input_grad[1]:
                continue
            if of_weight is None:
                of_weight = of_logits.T @ hidden[rows]
                of_weight = of_weight.to(context.sums) if len(chunks) > 1 else of_weight
            elif of_weight.dtype == weight.dtype:
                of_weight.addmm_(of_logits.T, hidden[rows])
            else:
                of_weight += of_logits.T @ hidden[rows]
        return of_hidden, None if of_weight is None else of_weight.to(weight.dtype), None, None, None


def _chunks(length: int, chunk: int) -> list[slice]:
    """Consecutive pieces of at most `chunk` rows; one empty piece of nothing, so that every call does the same."""
    return [slice(start, start + chunk) for start in range(0, max(1, length), chunk)]
