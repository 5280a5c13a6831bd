from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ilvr_ds.model import fingerprint as module
from ilvr_ds.model.fingerprint import fingerprint


def weights(dtype: torch.dtype) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {"a": torch.randn(7, 5).to(dtype), "b": torch.randn(35).to(dtype)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_it_depends_on_the_weights_alone(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    named = weights(dtype)
    name = fingerprint(named.items())
    named["a"] = named["a"].T.contiguous().T  # laid out otherwise
    assert fingerprint(reversed(named.items())) == name
    monkeypatch.setattr(module, "PIECE", 4)
    assert fingerprint(named.items()) == name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_any_change_is_another(dtype: torch.dtype) -> None:
    named = weights(dtype)
    bit, swapped = named["b"].clone(), named["b"].clone()
    bit.view({2: torch.int16, 4: torch.int32}[bit.element_size()])[-1] ^= 1
    swapped[[3, 4]] = swapped[[4, 3]]
    others = [
        {**named, "b": bit}, {**named, "b": swapped}, {**named, "b": named["b"].view(5, 7)}, {"a": named["a"]},
        {"a": named["a"], "c": named["b"]}, {**named, "b": named["b"].double()},
    ]  # fmt: skip
    assert len({fingerprint(other.items()) for other in [named, *others]}) == 7
