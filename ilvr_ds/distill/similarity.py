"""How similar the targets of different samples are: where all are alike, predicting them says nothing of a sample.

Letters: M segments, K latent slots, W samples of the window, D features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ilvr_ds.distill.selection import Targets
from ilvr_ds.ops.reference import unit


def unit_sums(targets: Targets, sample: Tensor, num_samples: int) -> Tensor:
    """[D + 3] float32, to be summed over windows that share no sample: the sum of all unit targets; over samples, the
    squared norm of a sample's sum; the number of targets; over samples, the square of a sample's number.

    sample [M] int64: the sample of each segment.
    """
    is_kept = (targets.indices >= 0).float()
    values = torch.einsum("mkd,mk->md", unit(targets.values()).float(), is_kept)
    of_sample = values.new_zeros(num_samples, values.shape[1]).index_add(0, sample, values)
    count = is_kept.new_zeros(num_samples).index_add(0, sample, is_kept.sum(1))
    parts = [of_sample.square().sum(), count.sum(), count.square().sum()]
    return torch.cat([of_sample.sum(0), torch.stack(parts)])


def similarity(sums: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of cosines over all pairs of targets of different samples, and the number of pairs: both [] float64."""
    total, within, count, squares = sums[:-3].double(), *sums[-3:].double().unbind()
    return total.square().sum() - within, count.square() - squares
