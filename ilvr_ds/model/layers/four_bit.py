"""Frozen linear layers in 4 bits under adapters: QLoRA (Dettmers et al., 2023), with bitsandbytes' kernels.

Weights are NF4 in blocks of 64 with doubly quantised scales, 0.52 bytes each, and are multiplied in the precision of
the input. They are buffers, not parameters: whole on every rank, and neither the engine nor a checkpoint holds them,
for the base model's files say what they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from ilvr_ds.errors import UserError
from ilvr_ds.model.fingerprint import fingerprint


def check_base(base: str) -> None:
    """Raise UserError where `model.lora_base` needs a package that is not there."""
    if base != "full" and find_spec("bitsandbytes") is None:
        raise UserError(f"model.lora_base is {base}: needs bitsandbytes; pip install bitsandbytes")


def round_trip(weight: Tensor) -> Tensor:
    """A weight packed to 4 bits and back, in its own precision."""
    return _unpack(*_pack(weight))


class FourBitLinear(nn.Linear):
    """A frozen linear layer with its weight in 4 bits on `device`, and its bias as it was."""

    def __init__(self, linear: nn.Linear, device: torch.device) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        values, self.state = _pack(linear.weight.detach().to(device))
        self.register_buffer("weight", values, persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out]. The backward unpacks the weight once more."""
        import bitsandbytes

        output: Tensor = bitsandbytes.matmul_4bit(input, self.weight.t(), self.state, bias=self.bias)
        return output

    def whole(self) -> Tensor:
        """The unpacked weight [out, in]."""
        return _unpack(self.weight, self.state)


def _pack(weight: Tensor) -> tuple[Tensor, Any]:
    """Bytes, each of two weights, and the scales."""
    from bitsandbytes.functional import quantize_4bit

    packed: tuple[Tensor, Any] = quantize_4bit(weight.contiguous(), quant_type="nf4", compress_statistics=True)
    return packed


def _unpack(values: Tensor, state: Any) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    weight: Tensor = dequantize_4bit(values, state)
    return weight


@torch.no_grad()
def pack_layers(
    language_model: Any, gather: Callable[[list[nn.Parameter]], AbstractContextManager[Any]], device: torch.device
) -> str:
    """Replace the decoder's linear layers by 4-bit ones, one after the other (collective).

    gather: opens a block in which sharded parameters are whole on every rank. Returns the fingerprint of the original
    weights.
    """

    def packed() -> Iterator[tuple[str, Tensor]]:
        for number, layer in enumerate(language_model.layers):
            for name, linear in [pair for pair in layer.named_modules() if isinstance(pair[1], nn.Linear)]:
                with gather([linear.weight]):
                    layer.set_submodule(name, FourBitLinear(linear, device))
                    # while the weight is whole
                    yield f"layers.{number}.{name}.weight", linear.weight

    return fingerprint(packed())


def weight_of(network: nn.Module, name: str) -> Tensor:
    """The weight of that name: a parameter, or the unpacked weight of a 4-bit layer."""
    owner = network.get_submodule(name.rpartition(".")[0])
    if isinstance(owner, FourBitLinear) and name.endswith(".weight"):
        return owner.whole()
    return network.get_parameter(name)
