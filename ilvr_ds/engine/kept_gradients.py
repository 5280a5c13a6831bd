"""Gradients on their way to the sum over ranks keep their memory until the sum has arrived."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor


def keep_until_reduced(optimizer: Any) -> None:
    """Let the memory of gradients wait for the stream in which ZeRO-1 and 2 sum them beside the backward.

    With `overlap_comm` DeepSpeed (0.19) sums in a stream of its own. A gradient with more elements than
    `reduce_bucket_size` goes there as it lies, and under ZeRO-2 a rank that has no part of the weight drops it at once.
    The backward may then take its memory, while it is still read, and the sum is written over what lies there: wrong
    gradients, without an error.
    """
    if optimizer.overlap_comm and optimizer.reduction_stream is not None:  # None on a CPU
        optimizer.average_tensor = partial(_average, optimizer.average_tensor, optimizer.reduction_stream)


def _average(average: Any, stream: Any, gradients: Tensor, *arguments: Any, **named: Any) -> None:
    gradients.record_stream(stream)
    average(gradients, *arguments, **named)
