from __future__ import annotations

from dataclasses import replace

import pytest

from ilvr_ds.planning.bound import bound_time
from ilvr_ds.planning.chips import CHIPS
from tests.planning.test_memory import setup_of

H200 = CHIPS["H200"]


def test_arithmetic_bounds_the_student_on_one_gpu() -> None:
    """6 FLOPs a weight and token at four fifths of the peak, roughly: the embedding does not multiply."""
    setup = setup_of("zero3_single_gpu.json")
    seconds = bound_time(setup, H200).parts["student"]
    assert seconds == pytest.approx(6 * setup.trained * 8 * 999 / (0.8 * 989e12), rel=0.1)
    again = bound_time(replace(setup, checkpointing="full"), H200).parts["student"]
    assert again == pytest.approx(4 / 3 * seconds)


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
    assert offloaded == pytest.approx(4 * setup.geometry.text.language_model / 2 / (0.8 * 64e9))
    assert resident < offloaded / 10
    beside_vision = bound_time(replace(setup, has_tower=True), H200).parts
    assert beside_vision["momentum update"] == pytest.approx(offloaded - beside_vision["vision"])


def test_the_bound_is_no_better_than_products_can_be() -> None:
    bound = bound_time(replace(setup_of("zero3_single_gpu.json"), teacher_offload="none"), H200)
    assert 0.5 < bound.mfu(H200) < 0.95 and bound.samples == 8
