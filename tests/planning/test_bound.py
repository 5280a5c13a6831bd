from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from ilvr_ds.planning.bound import PRODUCT_RATE, bound_time
from ilvr_ds.planning.chips import CHIPS
from tests.planning.test_memory import LORA, setup_of

H200 = CHIPS["H200"]
EIGHT_BIT = {"optimizer": "adamw_8bit"}
STORED = {**EIGHT_BIT, "has_tower": False}


@pytest.mark.parametrize(
    ("zero", "model", "world", "chip", "micro_batch", "window", "changes", "measured", "least"),
    [
        ("zero3_single_gpu.json", "7b", 1, "H200", 8, 32, EIGHT_BIT, 140.5, 0.86),
        ("zero3_single_gpu.json", "7b", 1, "H200", 8, 32, STORED, 127.0, 0.95),
        ("zero3_single_gpu.json", "7b", 1, "H200", 12, 36, STORED, 119.8, 0.95),
        ("zero1.json", "3b", 2, "H100", 6, 36, {}, 74.9, 0.8),
        ("zero3.json", "3b", 2, "H100", 12, 36, {}, 81.7, 0.7),
        ("zero3.json", "7b", 2, "H100", 4, 36, EIGHT_BIT, 175.6, 0.65),
        ("zero3_single_gpu.json", "3b", 1, "H200", 8, 32, {}, 86.7, 0.7),
        ("zero3_single_gpu.json", "3b", 1, "H100", 6, 36, {}, 85.5, 0.7),
        ("zero3_single_gpu.json", "3b", 1, "H100", 6, 36, {"checkpointing": "full"}, 135.7, 0.5),
        ("zero1.json", "3b", 1, "H100", 6, 36, LORA, 98.5, 0.5),
        ("zero3_offload_optimizer.json", "3b", 1, "H100", 6, 36, {"optimizer": "cpu_adam"}, 239.0, 0.5),
    ],
)
def test_the_measured_steps(
    zero: str,
    model: str,
    world: int,
    chip: str,
    micro_batch: int,
    window: int,
    changes: dict[str, Any],
    measured: float,
    least: float,
) -> None:
    """docs/performance.md: ms a sample and rank, of 999 tokens. No step is faster than the bound; 7B on one GPU, where
    the device is the limit, is near to it, and further down the host is the limit more and more."""
    setup = replace(
        setup_of(zero, model, world, micro_batch),
        grad_accum_steps=-(-window // micro_batch),
        logits_chunk=1024,
        **changes,
    )
    bound = bound_time(setup, CHIPS[chip])
    assert least < 1000 * bound.seconds * world / bound.samples / measured < 1


def test_arithmetic_bounds_the_student_on_one_gpu() -> None:
    """6 FLOPs a weight and token, roughly: the embedding does not multiply, but memory between products takes a
    seventh more."""
    setup = setup_of("zero3_single_gpu.json")
    seconds = bound_time(setup, H200).parts["student"]
    assert seconds == pytest.approx(1.07 * 6 * setup.trained * 8 * 999 / (PRODUCT_RATE * 989e12), rel=0.1)
    again = bound_time(replace(setup, checkpointing="full"), H200).parts["student"]
    assert again == pytest.approx(4 / 3 * seconds, rel=0.02)


def test_a_slow_link_bounds_small_micro_batches() -> None:
    """ZeRO-3 moves the weights three times a micro-batch: few tokens are not worth it."""
    setup = replace(setup_of("zero3.json", world=8, samples=1), has_teacher=False)
    fast, slow = (bound_time(setup, replace(H200, link=link)).parts["student"] for link in (4.5e11, 2.5e10))
    moved = 2 * 3 * 7 / 8 * 2 * setup.trained
    assert slow == pytest.approx(moved / (0.8 * 2.5e10)) and fast < slow / 5


def test_the_momentum_update_of_an_offloaded_teacher_is_bound_by_the_hosts_link() -> None:
    setup = replace(setup_of("zero3.json", world=2), has_tower=False)
    offloaded = bound_time(setup, H200).parts["momentum update"]
    resident = bound_time(replace(setup, teacher_offload="none"), H200).parts["momentum update"]
    assert offloaded == pytest.approx(4 * setup.geometry.text.language_model / 2 / (0.7 * 64e9))
    assert resident < offloaded / 10
    beside_vision = bound_time(replace(setup, has_tower=True), H200).parts
    assert beside_vision["momentum update"] == pytest.approx(max(0, offloaded - beside_vision["vision"]))


def test_the_bound_is_no_better_than_products_can_be() -> None:
    bound = bound_time(replace(setup_of("zero3_single_gpu.json"), teacher_offload="none"), H200)
    assert 0.4 < bound.mfu(H200) < PRODUCT_RATE and bound.samples == 8
