"""Runs of an experiment spread over the GPUs that there are, each on one of them."""

from __future__ import annotations

import os
from queue import SimpleQueue

import torch


def gpus() -> list[str]:
    """The GPUs that this process sees, as CUDA_VISIBLE_DEVICES names them; one place without a GPU: the CPU."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(number) for number in range(torch.cuda.device_count())] or [""]


def slots_of(together: int, gpus: list[str]) -> SimpleQueue[str]:
    """Places in which an arm can run, `together` on each GPU, those of different GPUs in turn."""
    slots: SimpleQueue[str] = SimpleQueue()
    for gpu in gpus * together:
        slots.put(gpu)
    return slots


def on_gpu(gpu: str) -> dict[str, str]:
    """The environment of a process that sees this GPU alone."""
    return {**os.environ, **({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {})}
