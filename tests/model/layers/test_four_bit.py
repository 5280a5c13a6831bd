from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from ilvr_ds.errors import UserError
from ilvr_ds.model.layers import four_bit
from ilvr_ds.model.layers.four_bit import FourBitLinear, check_base, pack_layers, round_trip, weight_of
from ilvr_ds.model.student import load_student
from ilvr_ds.planning.memory import FOUR_BITS
from tests.golden_set import golden_set

CPU = torch.device("cpu")
DEVICES = [CPU, *([torch.device("cuda")] if torch.cuda.is_available() else [])]


def linear(dtype: torch.dtype) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(256, 192).to(dtype).requires_grad_(False)


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_computes_what_a_linear_layer_with_the_rounded_weight_does(dtype: torch.dtype, device: torch.device) -> None:
    """Output and gradient; catches a weight that is transposed, another layer's scales, and a bias that is lost."""
    plain = linear(dtype).to(device)
    packed = FourBitLinear(plain, device)
    with torch.no_grad():
        plain.weight.copy_(round_trip(plain.weight))
    results = []
    for layer in (plain, packed):
        x = torch.randn(2, 5, 256, generator=torch.Generator().manual_seed(1)).to(device, dtype).requires_grad_()
        y = layer(x)
        y.square().sum().backward()
        assert x.grad is not None
        results.append((y.detach(), x.grad))
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for wanted, found in zip(*results, strict=True):
        assert float((wanted - found).norm() / wanted.norm()) < tolerance


def test_a_weight_takes_half_a_byte_and_keeps_its_direction() -> None:
    """The plan counts on the size. NF4 with a scale for each 64 weights is 8 to 10 % off where they are normal."""
    weight = torch.randn(1024, 2048, generator=torch.Generator().manual_seed(0))
    error = float((round_trip(weight) - weight).norm() / weight.norm())
    assert 0.05 < error < 0.12
    layer = FourBitLinear(nn.Linear(2048, 1024, bias=False), CPU)
    scales = layer.state
    held = [layer.weight, scales.absmax, scales.state2.absmax]
    assert sum(x.nbytes for x in held) == pytest.approx(FOUR_BITS * 1024 * 2048, rel=1e-3)


def test_neither_parameters_nor_checkpoints_hold_them() -> None:
    golden = golden_set()
    model = load_student(golden.model, torch.float32, 0)
    before = copy.deepcopy(model)
    pack_layers(model.model.language_model, lambda _: nullcontext(), CPU)
    gone = {f"model.language_model.layers.{i}.{n}.weight" for i, layer in enumerate(before.model.language_model.layers)
            for n, m in layer.named_modules() if isinstance(m, nn.Linear)}  # fmt: skip
    assert set(before.state_dict()) - set(model.state_dict()) == gone
    assert {name for name, _ in before.named_parameters()} - {name for name, _ in model.named_parameters()} == gone
    for name, weight in before.named_parameters():
        assert torch.equal(weight_of(model, name), round_trip(weight) if name in gone else weight), name


def test_without_the_package_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(four_bit, "find_spec", lambda _: None)
    check_base("full")
    with pytest.raises(UserError, match=r"^model\.lora_base is nf4: needs bitsandbytes; pip install bitsandbytes$"):
        check_base("nf4")
