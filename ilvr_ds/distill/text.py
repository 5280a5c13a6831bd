"""The losses of the text: cross-entropy, in all and by type of task, and which answers are right."""

from __future__ import annotations

import torch
from torch import Tensor

from ilvr_ds.data.window import MicroBatch


def text_sums(losses: Tensor, best: Tensor, micro: MicroBatch) -> dict[str, Tensor]:
    """ce [], the sum over labels; ce_by_type [types] and, in a mixture, ce_by_set [sets], without gradient; right [B]
    bool, whether the answer is.

    losses [L] float32 and best [L]: cross-entropy and most probable token at the micro-batch's supervised tokens.
    """
    kinds = losses.new_zeros(len(micro.supervised_by_type) + 1)
    by_set = {} if micro.label_sets is None else {"ce_by_set": sums_by_set(losses, micro.label_sets, micro)}
    return {
        **by_set,
        "ce": losses.sum(),
        "ce_by_type": kinds.index_add(0, micro.label_types, losses.detach())[:-1],
        "right": answers_right(best, micro),
    }


def sums_by_set(losses: Tensor, of: Tensor, micro: MicroBatch) -> Tensor:
    """[sets]: the sum of the losses [N] of each data set, without gradient. of [N]: the set of each."""
    assert micro.supervised_by_set is not None
    return losses.new_zeros(len(micro.supervised_by_set)).index_add(0, of, losses.detach())


def answers_right(best: Tensor, micro: MicroBatch) -> Tensor:
    """[B] bool: all answer tokens of the sample are the most probable ones, given the text before; False without any.

    best [L]: most probable token at each of the micro-batch's supervised tokens.
    """
    right = best == micro.label_ids
    wrong = (~right[micro.answer_rows]).float()
    misses = torch.zeros_like(micro.has_answer, dtype=torch.float32).index_add(0, micro.answer_samples, wrong)
    return micro.has_answer & (misses == 0)
