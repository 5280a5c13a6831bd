from __future__ import annotations

import pytest

from ilvr_ds.planning.chips import find_chip


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H20", 148),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA GB200", 2500),
        ("NVIDIA L40S", 362),
    ],
)
def test_devices_are_known_by_the_names_that_drivers_give(name: str, teraflops: float) -> None:
    chip = find_chip(name)
    assert chip is not None and chip.flops == teraflops * 1e12


@pytest.mark.parametrize(
    "name", ["a CPU", "NVIDIA GeForce RTX 3090", "NVIDIA H2000", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"]
)
def test_others_are_not_guessed(name: str) -> None:
    assert find_chip(name) is None
