"""Peak rates of accelerators, from their data sheets, by torch's device names, and cards with their memory."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ilvr_ds.errors import UserError, nearest


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
    "GH200": Chip(989e12, 4.0e12, 450e9, 450e9),
    "H800": Chip(989e12, 3.35e12, 200e9, 64e9),
    "H20": Chip(148e12, 4.0e12, 450e9, 64e9),
    "GB200": Chip(2500e12, 8.0e12, 900e9, 450e9),
    "B200": Chip(2250e12, 8.0e12, 900e9, 64e9),
    "A100": Chip(312e12, 2.0e12, 300e9, 32e9),
    "A800": Chip(312e12, 2.0e12, 200e9, 32e9),
    "L40S": Chip(362e12, 0.864e12, 32e9, 32e9),
    "L4": Chip(121e12, 0.3e12, 32e9, 32e9),
    "RTX A6000": Chip(155e12, 0.768e12, 32e9, 32e9),
    "RTX 3090": Chip(71e12, 0.936e12, 32e9, 32e9),
    "RTX 4090": Chip(165e12, 1.008e12, 32e9, 32e9),
    "RTX 5090": Chip(209e12, 1.792e12, 64e9, 64e9),
}
"""By a part of the device's name; the first match counts."""
_OTHER = {"MIG", "Ti", "SUPER", "D", "Laptop"}
"""Words in the name of a part of a chip, or of another one."""


@dataclass(frozen=True)
class Card:
    """A card by the name that people use."""

    gib: float
    """That torch finds on it, at the least of what is reported"""
    chip: str | None
    """In CHIPS; None: no step has been bounded on such a chip, and its time is unknown"""


CARDS = {
    "RTX 3090": Card(23.5, "RTX 3090"),
    "RTX 4090": Card(23.5, "RTX 4090"),
    "RTX 5090": Card(31.3, "RTX 5090"),
    "RTX A6000": Card(47.4, "RTX A6000"),
    "L4": Card(21.9, "L4"),
    "L40S": Card(44.3, "L40S"),
    "A100 40": Card(39.4, "A100"),
    "A100 80": Card(79.1, "A100"),
    "H100": Card(79.1, "H100"),
    "H200": Card(139.8, "H200"),
    "GH200": Card(94.4, "GH200"),
    "B200": Card(178.3, "B200"),
    "MI300X": Card(191.4, None),
}
"""GDDR cards without ECC, as they are delivered (L4 and L40S: with it)."""
USABLE_GIB = {24.0: 23.5, 32.0: 31.3, 40.0: 39.4, 48.0: 47.4, 80.0: 79.2, 141.0: 139.8}
"""GiB that torch finds on cards sold as so many GB: 3090 and 4090, 5090, A100, A6000, H100, H200."""


def usable_gib(named: float) -> float:
    """GiB usable on a GPU of `named` GB: looked up for a card's nominal size, otherwise taken as measured GiB."""
    return USABLE_GIB.get(named, named)


def find_chip(device_name: str) -> Chip | None:
    """The chip of a torch device name ("NVIDIA H100 80GB HBM3"); None for a CPU or a device not in the table."""
    words = device_name.replace("-", " ").split()
    if _OTHER.intersection(words):
        return None
    for name, chip in CHIPS.items():
        wanted = name.split()
        if any(words[start : start + len(wanted)] == wanted for start in range(len(words))):
            return chip
    return None


def find_card(wanted: str) -> tuple[str, Card]:
    """The card of a name like "RTX 4090", "4090", "a100-80gb", with its name here. Raises UserError."""
    by_key = {key: name for name in CARDS for key in (_key(name), _key(name.removeprefix("RTX ")))}
    if (name := by_key.get(_key(wanted))) is not None:
        return name, CARDS[name]
    begins = [name for name in CARDS if _key(wanted) and _key(name).startswith(_key(wanted))]
    hint = f"; say {' or '.join(begins)}" if begins else nearest(wanted, CARDS)
    raise UserError(f"--card {wanted}: not known{hint}. For another card give --gpu-memory")


def _key(name: str) -> str:
    """Lower case, without makers, separators and GB."""
    return re.sub(r"nvidia|geforce|amd|instinct|tesla|gb$|[^a-z0-9]", "", name.lower())
