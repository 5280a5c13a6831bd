from __future__ import annotations

import pytest

from ilvr_ds.errors import UserError
from ilvr_ds.planning.chips import CARDS, CHIPS, find_card, find_chip


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
        ("NVIDIA L4", 121),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA GeForce RTX 3090", 71),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 5090", 209),
        ("NVIDIA RTX A6000", 155),
    ],
)
def test_devices_are_known_by_the_names_that_drivers_give(name: str, teraflops: float) -> None:
    chip = find_chip(name)
    assert chip is not None and chip.flops == teraflops * 1e12


@pytest.mark.parametrize(
    "name",
    [
        "a CPU", "NVIDIA GeForce RTX 2080 Ti", "NVIDIA GeForce RTX 3090 Ti", "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA H2000", "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "AMD Instinct MI300X",
    ],
)  # fmt: skip
def test_others_are_not_guessed(name: str) -> None:
    assert find_chip(name) is None


@pytest.mark.parametrize(
    ("wanted", "name"),
    [
        ("RTX 4090", "RTX 4090"), ("4090", "RTX 4090"), ("rtx4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 3090", "RTX 3090"),
        ("A6000", "RTX A6000"), ("A100-80GB", "A100 80"), ("a100 40", "A100 40"), ("MI300X", "MI300X"), ("l4", "L4"),
    ],
)  # fmt: skip
def test_cards_have_the_names_that_people_say(wanted: str, name: str) -> None:
    assert find_card(wanted) == (name, CARDS[name])


@pytest.mark.parametrize(
    ("wanted", "words"),
    [("A100", "say A100 40 or A100 80"), ("RTX 4080", "did you mean 'RTX 40"), ("", "valid: A100 40, A100 80, B200")],
)
def test_a_card_that_is_not_known_is_not_guessed(wanted: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        find_card(wanted)


def test_every_card_has_a_chip_with_rates_or_none() -> None:
    assert {card.chip for card in CARDS.values()} - {None} <= CHIPS.keys()
    wanted = ("RTX 3090", "RTX 4090", "RTX 5090", "RTX A6000", "L4", "A100 40", "A100 80", "H100", "H200", "B200")
    assert {*wanted, "GH200", "MI300X"} <= CARDS.keys()
    assert CARDS["MI300X"].chip is None, "nothing here has run on one"
