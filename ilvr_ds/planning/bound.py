"""A bound on the time of an optimizer step: what the chip's arithmetic, its memory and its links need at least.

Nothing here is measured. Matrix products run at PRODUCT_RATE of the data sheet's peak; transfers beside arithmetic cost
only what they take longer; launches, attention, norms, imbalance and waiting cost nothing. A real step takes longer.
"""

from __future__ import annotations

from dataclasses import dataclass

from ilvr_ds.planning.chips import Chip
from ilvr_ds.planning.flops import ModelFlops, Work
from ilvr_ds.planning.memory import optimizer_bytes
from ilvr_ds.planning.setup import Setup

PRODUCT_RATE = 0.8
"""Large bf16 products on random data reach 790 of an H200's 989 TFLOP/s."""
LINK_RATE = 0.8
"""Assumed for large transfers."""
HOST_MEMORY = 100e9
"""Assumed: bytes a second of host memory for each rank."""


@dataclass(frozen=True)
class Bound:
    """Seconds of an optimizer step by part, and the rank's model FLOPs."""

    parts: dict[str, float]
    flops: float
    samples: int
    """Of the step on all ranks"""

    @property
    def seconds(self) -> float:
        """The whole step."""
        return sum(self.parts.values())

    def mfu(self, chip: Chip) -> float:
        """`speed/mfu` at this time."""
        return self.flops / self.seconds / chip.flops


def bound_time(setup: Setup, chip: Chip) -> Bound:
    """The parts of a step of `setup` on ranks with a `chip` each, all in one host."""
    formula = ModelFlops(setup.geometry, setup.trained, setup.frozen, setup.has_teacher)
    work = _work(setup)
    flops, rate = formula.matmul(work), PRODUCT_RATE * chip.flops
    again = {"none": 0.0, "selective": 0.0, "full": 1.0}[setup.checkpointing]
    passes = 2 if setup.frozen else 3
    student = flops.student * (1 + again / passes) / rate
    parts = {
        "vision": flops.vision / rate,
        "student": max(student, setup.grad_accum_steps * _communication(setup, chip)),
        "optimizer": _optimizer(setup, chip),
    }
    if setup.has_teacher:
        parts["teacher"] = max(flops.teacher / rate, _teacher_transfer(setup, chip))
        parts["momentum update"] = max(0.0, _momentum(setup, chip) - parts["vision"])  # beside which it runs
    return Bound(parts, formula.of(work).total, setup.window_samples * setup.world)


def _work(setup: Setup) -> Work:
    sample, count = setup.sample, setup.window_samples
    patches = count * sample.patches if setup.has_tower else 0
    return Work(count, count * sample.tokens, count * sample.tokens**2, count * sample.labels, patches)


def _communication(setup: Setup, chip: Chip) -> float:
    """Of one micro-batch: ZeRO-3 gathers the weights for the forward and the backward and scatters the gradients."""
    others = (setup.world - 1) / setup.world
    gathered = 2 * setup.held if setup.zero.stage == 3 else 0
    moved = setup.itemsize * others * (gathered + setup.trained)
    from_host = setup.itemsize * setup.shard(2 * setup.held) if setup.zero.offloads_weights else 0
    return max(moved / (LINK_RATE * chip.link), from_host / (LINK_RATE * chip.host_link))


def _optimizer(setup: Setup, chip: Chip) -> float:
    """Reading and writing of the float32 state, and gradients and weights beside it."""
    mine = setup.shard(setup.trained)
    touched = mine * (2 * (4 + optimizer_bytes(setup.optimizer)) + 2 * setup.itemsize)
    if not setup.zero.offloads_optimizer:
        return touched / chip.memory_bandwidth
    return touched / HOST_MEMORY + 2 * setup.itemsize * mine / (LINK_RATE * chip.host_link)


def _teacher_transfer(setup: Setup, chip: Chip) -> float:
    weights, others = setup.geometry.text.language_model, (setup.world - 1) / setup.world
    seconds = setup.itemsize * others * weights / (LINK_RATE * chip.link)
    if setup.teacher_offload == "cpu":
        seconds = max(seconds, setup.itemsize * setup.shard(weights) / (LINK_RATE * chip.host_link))
    return seconds


def _momentum(setup: Setup, chip: Chip) -> float:
    """Averages down and up again at once, as what the network reads and the rest; on the device only its own memory."""
    mine = setup.shard(setup.trained if setup.frozen else setup.geometry.text.language_model)
    moved = mine * (setup.average_itemsize + setup.itemsize)
    if setup.teacher_offload == "cpu":
        return moved / (LINK_RATE * chip.host_link)
    return (moved + 8 * mine) / chip.memory_bandwidth
