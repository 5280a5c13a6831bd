"""Peak rates of accelerators, from their data sheets, by torch's device names."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """Peaks of one device."""

    flops: float
    """FLOP/s of dense bf16 matrix products with fp32 accumulation; data sheets of Hopper and later print twice that,
    for sparse ones."""
    memory_bandwidth: float
    """Bytes a second"""
    link: float
    """Bytes a second to the other GPUs of the host, one direction"""
    host_link: float
    """Bytes a second to the host, one direction"""


CHIPS = {
    "H100 PCIe": Chip(756e12, 2.0e12, 64e9, 64e9),
    "H100 NVL": Chip(835e12, 3.9e12, 300e9, 64e9),
    "H100": Chip(989e12, 3.35e12, 450e9, 64e9),
    "H200": Chip(989e12, 4.8e12, 450e9, 64e9),
    "H800": Chip(989e12, 3.35e12, 200e9, 64e9),
    "H20": Chip(148e12, 4.0e12, 450e9, 64e9),
    "GB200": Chip(2500e12, 8.0e12, 900e9, 450e9),
    "B200": Chip(2250e12, 8.0e12, 900e9, 64e9),
    "A100": Chip(312e12, 2.0e12, 300e9, 32e9),
    "A800": Chip(312e12, 2.0e12, 200e9, 32e9),
    "L40S": Chip(362e12, 0.864e12, 32e9, 32e9),
}
"""By a part of the device's name; the first match counts."""


USABLE_GIB = {40.0: 39.4, 80.0: 79.2, 141.0: 139.8}
"""GiB that torch finds on cards sold as so many GB: A100, H100, H200."""


def usable_gib(named: float) -> float:
    """GiB usable on a GPU of `named` GB: looked up for a card's nominal size, otherwise taken as measured GiB."""
    return USABLE_GIB.get(named, named)


def find_chip(device_name: str) -> Chip | None:
    """The chip of a torch device name ("NVIDIA H100 80GB HBM3"); None for a CPU or a device not in the table."""
    words = device_name.replace("-", " ").split()
    if "MIG" in words:  # a part of a chip
        return None
    for name, chip in CHIPS.items():
        wanted = name.split()
        if any(words[start : start + len(wanted)] == wanted for start in range(len(words))):
            return chip
    return None
