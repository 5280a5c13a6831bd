"""Dataclasses of tensors that move to a device, or into pinned memory, as one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch

Tree = TypeVar("Tree", bound="TensorTree")


@dataclass(frozen=True)
class TensorTree:
    """A frozen dataclass of tensors (and such dataclasses); fields marked host=True never leave the CPU."""

    def to(self: Tree, device: torch.device) -> Tree:
        """The tree with all device fields on `device`; asynchronous from pinned memory.

        Tensors that share memory move as one and share it again: a window that came in a Parcel is one copy.
        """
        return self.map(_together(lambda memory: memory.to(device, non_blocking=True)))

    def pin_memory(self: Tree) -> Tree:
        """The tree in pinned memory."""
        return self.map(_together(torch.Tensor.pin_memory), host_too=True)

    def map(self: Tree, function: Callable[[Any], Any], host_too: bool = False) -> Tree:
        """The tree with each tensor (or Place) replaced by `function` of it; host fields only with `host_too`."""

        def mapped(value: Any) -> Any:
            if isinstance(value, (torch.Tensor, Place)):
                return function(value)
            if isinstance(value, TensorTree):
                return value.map(function, host_too)
            if isinstance(value, tuple) and value and isinstance(value[0], TensorTree):
                return tuple(mapped(item) for item in value)
            return value

        chosen = [f.name for f in fields(self) if host_too or not f.metadata.get("host")]
        moved = {name: mapped(getattr(self, name)) for name in chosen}
        return replace(self, **moved)


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in a piece of memory that is sent apart (Parcel)."""

    start: int
    """First byte"""
    shape: torch.Size
    dtype: torch.dtype


def _together(move: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function of single tensors that calls `move` once for each piece of memory, as bytes [n] uint8."""
    moved: dict[tuple[int, int], torch.Tensor] = {}

    def function(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        key = storage.data_ptr(), storage.nbytes()
        if key not in moved:
            moved[key] = move(torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage))
        target = torch.empty(0, dtype=tensor.dtype, device=moved[key].device)
        return target.set_(moved[key].untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())

    return function
