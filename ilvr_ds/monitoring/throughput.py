"""How fast a run is: rates, and model FLOPs utilisation (MFU)."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from ilvr_ds import dist
from ilvr_ds.model.layers.four_bit import FourBitLinear
from ilvr_ds.planning.chips import find_chip
from ilvr_ds.planning.flops import ModelFlops, Work
from ilvr_ds.planning.geometry import geometry_of

logger = logging.getLogger("ilvr_ds")


class Throughput:
    """Counts what the CPU knows of each step; never touches the device.

    peak: FLOP/s of one rank's device; None where it is not known, and then there are no `speed/mfu`.
    """

    def __init__(self, flops: ModelFlops, peak: float | None) -> None:
        self.flops = flops
        self.peak = peak
        self.start()

    def start(self) -> None:
        """Begin anew."""
        self._since = time.monotonic()
        self._away = 0.0
        self._steps = self._padding = 0
        self._work = Work()

    def add(self, work: Work, padding: int) -> None:
        """One step of this rank, and its padding in tokens."""
        self._steps += 1
        self._work += work
        self._padding += padding

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time in this block (evaluating, saving) does not count."""
        start = time.monotonic()
        yield
        self._away += time.monotonic() - start

    def take(self) -> dict[str, float]:
        """Rates of all ranks since the last call (collective, through host memory)."""
        seconds = max(time.monotonic() - self._since - self._away, 1e-9)
        ranks = dist.gather_on_host((self._work, self._padding))
        work = sum((work for work, _ in ranks), Work())
        padding = sum(padding for _, padding in ranks)
        metrics = {
            "speed/s_per_step": seconds / max(1, self._steps),
            "speed/samples_per_s": work.samples / seconds,
            "speed/tokens_per_s": work.tokens / seconds,
            "data/padding": padding / max(1, padding + work.tokens),
        }
        if self.peak is not None:
            possible = seconds * self.peak * len(ranks)
            metrics["speed/mfu"] = self.flops.of(work).total / possible
            metrics["speed/mfu_matmul"] = self.flops.matmul(work).total / possible
        self.start()
        return metrics


def model_flops(student: Any, config: Any, has_teacher: bool) -> ModelFlops:
    """The arithmetic of a run: of `student` (a stage's root module, sharded or not) the weights are counted.

    config: the configuration at `model.path`; the student's own knows of no tower where features are stored.
    """
    geometry = geometry_of(config)
    vocab_size = student.model.config.text_config.vocab_size  # it may have grown
    geometry = replace(geometry, text=replace(geometry.text, vocab_size=vocab_size))
    counts = {True: 0, False: 0}
    for parameter in student.parameters():
        counts[parameter.requires_grad] += getattr(parameter, "ds_numel", parameter.numel())
    for module in student.modules():
        if isinstance(module, FourBitLinear):
            counts[False] += module.in_features * module.out_features
    return ModelFlops(geometry, trained=counts[True], frozen=counts[False], has_teacher=has_teacher)


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of the data sheet; None, said in the log, for a device that is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
    chip = find_chip(name)
    if chip is None:
        logger.info("no speed/mfu: the peak of %s is not in the table (ilvr_ds/planning/chips.py)", name)
        return None
    return chip.flops
