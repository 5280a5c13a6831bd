"""Weights on their way to the ranks are gathered once the optimizer has written them."""

from __future__ import annotations

from functools import partial
from typing import Any

from deepspeed.accelerator import get_accelerator


def gather_when_written(optimizer: Any) -> None:
    """Let the stream in which ZeRO-3 gathers weights wait for each step of the optimizer.

    With `overlap_comm` DeepSpeed (0.19) gathers in a stream of its own, which waits for nothing. After a step it
    gathers the small weights that it keeps whole, and waits for the device. Where there are none, as with a
    `stage3_param_persistence_threshold` of 0, the next forward may gather what is not written yet: weights of the step
    before, without an error.
    """
    stream = optimizer.parameter_offload._DeepSpeedZeRoOffload__allgather_stream
    if stream is not None:  # None on a CPU
        optimizer.step = partial(_step, optimizer.step, stream)


def _step(step: Any, stream: Any, *arguments: Any, **named: Any) -> None:
    step(*arguments, **named)
    stream.wait_stream(get_accelerator().current_stream())
