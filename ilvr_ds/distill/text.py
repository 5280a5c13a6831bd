"""What the student's logits on the true text say: the cross-entropy, whole and by kind of task, and right answers."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ilvr_ds.data.window import MicroBatch


def text_sums(logits: Tensor, micro: MicroBatch) -> dict[str, Tensor]:
    """ce [], the sum over labels; ce_by_type [types], without gradient; right [B] bool, whether the answer is.

    logits [L, V] of the micro-batch's supervised tokens.
    """
    losses = cross_entropy(logits.float(), micro.label_ids, reduction="none")
    kinds = losses.new_zeros(len(micro.supervised_by_type) + 1)
    return {
        "ce": losses.sum(),
        "ce_by_type": kinds.index_add(0, micro.label_types, losses.detach())[:-1],
        "right": answers_right(logits.detach(), micro),
    }


def answers_right(logits: Tensor, micro: MicroBatch) -> Tensor:
    """[B] bool: all answer tokens of the sample are the most probable ones, given the text before; False without.

    logits [L, V] of the micro-batch's supervised tokens.
    """
    right = logits.argmax(-1) == micro.label_ids
    wrong = (~right[micro.answer_rows]).float()
    misses = torch.zeros_like(micro.has_answer, dtype=torch.float32).index_add(0, micro.answer_samples, wrong)
    return micro.has_answer & (misses == 0)
