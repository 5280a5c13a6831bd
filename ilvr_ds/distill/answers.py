"""Whether the student would answer rightly, told from its logits on the true text."""

from __future__ import annotations

import torch
from torch import Tensor

from ilvr_ds.data.window import MicroBatch


def answers_right(logits: Tensor, micro: MicroBatch) -> Tensor:
    """[B] bool: all answer tokens of the sample are the most probable ones, given the text before; False without.

    logits [L, V] of the micro-batch's supervised tokens.
    """
    right = logits.argmax(-1) == micro.label_ids
    wrong = (~right[micro.answer_rows]).float()
    misses = torch.zeros_like(micro.has_answer, dtype=torch.float32).index_add(0, micro.answer_samples, wrong)
    return micro.has_answer & (misses == 0)
