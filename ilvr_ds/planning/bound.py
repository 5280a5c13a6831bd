"""A lower bound on the time of an optimizer step: a device that is never idle.

Matrix products and attention run at a fraction of the data sheet's peak, everything between them at memory bandwidth;
transfers overlap with arithmetic and cost only the excess. Launches, the host, imbalance and waiting cost nothing. The
rates are those that H100s and H200s reached in the benchmark of a step (docs/performance.md): 7B on one GPU took 1.01
to 1.15 times the bound, and where the host is the limit (3B, or ZeRO-3 with small micro-batches) up to 2.2 times.
"""

from __future__ import annotations

from dataclasses import dataclass

from ilvr_ds.planning.chips import Chip
from ilvr_ds.planning.flops import ModelFlops, Work
from ilvr_ds.planning.memory import FOUR_BITS, optimizer_bytes
from ilvr_ds.planning.setup import Setup

PRODUCT_RATE = 0.65
"""Of the peak, measured: products and attention of the language model, 7B on an H200. Large products alone: 0.8."""
TOWER_RATE = 0.42
"""Measured: the same for the vision tower, whose layers are narrower, including everything between products."""
MEMORY_RATE = 0.9
"""Measured: large copies on the device, 3.0 of 3.35 TB/s (H100) and 4.3 of 4.8 (H200)."""
LOGIT_TRAFFIC = 30
"""Assumed: bytes per logit, in 16 bit, float32 and as log-softmax, forward and backward."""
OPTIMIZER_TRAFFIC, OPTIMIZER_TRAFFIC_8BIT = 140, 220
"""Measured: bytes per trained weight that memory could have moved during the optimizer step. 28 and 16 are necessary;
DeepSpeed passes over the gradients several times, and 8-bit states are unpacked and packed."""
LINK_RATE = 0.8
"""Of the link between GPUs, or to the host; assumed for large transfers."""
BOTH_WAYS_RATE = 0.7
"""Of the link to the host, measured: 44 of 64 GB/s in each direction at once."""
HOST_MEMORY = 38e9
"""Measured: bytes a second that DeepSpeed's CPU Adam moved at 3B on 32 cores."""


@dataclass(frozen=True)
class Bound:
    """Seconds of an optimizer step by part, and the rank's model FLOPs."""

    parts: dict[str, float]
    flops: float
    samples: int
    """Samples of the step on all ranks"""

    @property
    def seconds(self) -> float:
        """The whole step."""
        return sum(self.parts.values())

    def mfu(self, chip: Chip) -> float:
        """`speed/mfu` of a step at the bound."""
        return self.flops / self.seconds / chip.flops


def bound_time(setup: Setup, chip: Chip) -> Bound:
    """The parts of a step of `setup`, with one `chip` per rank, all in one host."""
    formula = ModelFlops(setup.geometry, setup.trained, setup.frozen, setup.has_teacher)
    work = _work(setup)
    flops, rate = formula.matmul(work), PRODUCT_RATE * chip.flops
    between = _between_products(setup, work) / (MEMORY_RATE * chip.memory_bandwidth)
    passes = 2 if setup.frozen else 3
    forwards = 4 if setup.checkpointing == "full" else 3  # a backward costs two forwards
    forwards *= setup.passes
    forwards += setup.latent_gradient is not None and not setup.has_whole_chain  # the pass that makes the latents
    student = flops.student * (1 + (forwards - 3) / passes) / rate + forwards * between
    student += (_sums(setup, work) + _unpacking(setup)) / (MEMORY_RATE * chip.memory_bandwidth)
    parts = {
        "vision": flops.vision / (TOWER_RATE * chip.flops),
        "student": max(student, setup.grad_accum_steps * _communication(setup, chip)),
        "optimizer": _optimizer(setup, chip),
    }
    if setup.has_teacher:
        parts["teacher"] = max(flops.teacher / rate + between, setup.teacher_pieces * _teacher_transfer(setup, chip))
        parts["momentum update"] = max(0.0, _momentum(setup, chip) - parts["vision"])  # it overlaps with vision
    return Bound(parts, formula.of(work).total, setup.window_samples * setup.world)


def _between_products(setup: Setup, work: Work) -> float:
    """Bytes that a forward of the layers reads and writes between products: norms and residual sums 10 D, rotating,
    laying out and attending to queries, keys and values 6 Q + 8 KV, the gated product 3 I (letters: memory.py)."""
    text = setup.geometry.text
    turned = (6 * text.heads + 8 * text.kv_heads) * text.head_dim
    elements = 10 * text.hidden_size + turned + 3 * text.intermediate_size
    return float(setup.itemsize * elements * text.layers * work.tokens)


def _sums(setup: Setup, work: Work) -> float:
    """Bytes for accumulating each micro-batch's gradients, and for logits."""
    summed = (setup.itemsize + 2 * setup.gradient_itemsize) * setup.trained * setup.grad_accum_steps
    return summed + LOGIT_TRAFFIC * setup.geometry.text.vocab_size * work.labels


def _unpacking(setup: Setup) -> float:
    """Bytes for a base in 4 bits: read, written in 16 bits and read for each pass that multiplies with it."""
    uses = (2 + (setup.checkpointing == "full")) * setup.passes * setup.grad_accum_steps
    return uses * (FOUR_BITS + 2 * setup.itemsize) * setup.packed


def _work(setup: Setup) -> Work:
    sample, count = setup.sample, setup.window_samples
    patches = count * sample.patches if setup.has_tower else 0
    return Work(count, count * sample.tokens, count * sample.tokens**2, count * sample.labels, patches)


def _communication(setup: Setup, chip: Chip) -> float:
    """Seconds per micro-batch: ZeRO-3 gathers the weights for forward and backward, and scatters the gradients."""
    others = (setup.world - 1) / setup.world
    gathered = 2 * setup.held if setup.zero.stage == 3 else 0
    moved = others * (setup.itemsize * gathered + setup.gradient_itemsize * setup.trained)
    from_host = setup.itemsize * setup.shard(2 * setup.held) if setup.zero.offloads_weights else 0
    return max(moved / (LINK_RATE * chip.link), from_host / (LINK_RATE * chip.host_link))


def _optimizer(setup: Setup, chip: Chip) -> float:
    """On the host: reading and writing the float32 state, gradients and weights, and transferring the last two."""
    mine = setup.shard(setup.trained)
    if not setup.zero.offloads_optimizer:
        traffic = OPTIMIZER_TRAFFIC_8BIT if setup.optimizer.endswith("8bit") else OPTIMIZER_TRAFFIC
        return traffic * mine / chip.memory_bandwidth
    touched = mine * (2 * (4 + optimizer_bytes(setup.optimizer)) + 2 * setup.itemsize)
    return touched / HOST_MEMORY + 2 * setup.itemsize * mine / (LINK_RATE * chip.host_link)


def _teacher_transfer(setup: Setup, chip: Chip) -> float:
    weights, others = setup.geometry.text.language_model, (setup.world - 1) / setup.world
    seconds = setup.itemsize * others * weights / (LINK_RATE * chip.link)
    if setup.teacher_offload == "cpu":
        seconds = max(seconds, setup.itemsize * setup.shard(weights) / (LINK_RATE * chip.host_link))
    return seconds


def _momentum(setup: Setup, chip: Chip) -> float:
    """Averages from the host and back, both directions at once; with a teacher on the device, memory traffic alone."""
    mine = setup.shard(setup.trained if setup.frozen else setup.geometry.text.language_model)
    moved = mine * (setup.average_itemsize + setup.itemsize)
    if setup.teacher_offload == "cpu":
        return moved / (BOTH_WAYS_RATE * chip.host_link)
    return (moved + 8 * mine) / chip.memory_bandwidth
