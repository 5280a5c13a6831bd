"""Checks operators' arguments on the host: shapes, types and devices; values only of tensors on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INDEX = (torch.int64,)


class Arguments:
    """Checks arguments for one device and for sizes by letter; errors name the argument and what was expected."""

    def __init__(self, first: str, tensor: Tensor) -> None:
        self._first = first
        self._device = tensor.device
        self._sizes: dict[str, int] = {}

    def check(self, name: str, tensor: Tensor, shape: str, dtypes: tuple[torch.dtype, ...]) -> None:
        """`shape` names the dimensions, as "M D": a letter seen before must have its size; "M+1" is one more.

        Raises TypeError for the wrong type of number, ValueError for the wrong shape or device.
        """
        if tensor.dtype not in dtypes:
            expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise TypeError(f"{name} {list(tensor.shape)} is {tensor.dtype}: expected {expected}")
        if tensor.device != self._device:
            raise ValueError(
                f"{name} {list(tensor.shape)} is on {tensor.device}: expected {self._device}, like {self._first}"
            )
        letters = shape.split()
        if tensor.dim() != len(letters) or not all(map(self._fits, letters, tensor.shape)):
            known = ", ".join(f"{letter} = {size}" for letter, size in self._sizes.items() if letter in shape)
            raise ValueError(f"{name} has shape {list(tensor.shape)}: expected [{', '.join(letters)}] with {known}")

    def _fits(self, letter: str, size: int) -> bool:
        if letter.endswith("+1"):
            letter, size = letter[:-2], size - 1
        return self._sizes.setdefault(letter, size) == size


def readable(tensor: Tensor) -> bool:
    """Whether values may be looked at: on the CPU and not under a tracer. On GPUs the kernels trap on bad ones."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def check_offsets(offsets: Tensor, rows: int) -> None:
    """Raises ValueError where candidate_offsets do not ascend from 0 to the number of rows."""
    values = offsets.tolist()
    if values[0] != 0 or values[-1] != rows or values != sorted(values):
        shown = f"{values[:4]}..." if len(values) > 4 else values
        raise ValueError(
            f"candidate_offsets {list(offsets.shape)} = {shown}: expected ascending numbers from 0 to {rows}"
        )


def check_range(name: str, index: Tensor, lowest: int, end: int) -> None:
    """Raises IndexError where an index is not in lowest to end - 1."""
    if index.numel():
        low, high = (int(x) for x in index.aminmax())
        if low < lowest or high >= end:
            raise IndexError(f"{name} {list(index.shape)} holds {low} to {high}: expected {lowest} to {end - 1}")
