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
        """The same with all device fields on `device`; asynchronous from pinned memory. What shares memory goes there
        as one, and shares it there: a window that came in a Parcel is one copy."""
        return self.map(_together(lambda memory: memory.to(device, non_blocking=True)))

    def pin_memory(self: Tree) -> Tree:
        """The same in pinned memory."""
        return self.map(_together(torch.Tensor.pin_memory), host_too=True)

    def map(self: Tree, function: Callable[[Any], Any], host_too: bool = False) -> Tree:
        """The same with `function` of each tensor (or Place) in its stead."""

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
    """For tensors one by one what `move` does to bytes [n] uint8, which is called once for each piece of memory."""
    moved: dict[tuple[int, int], torch.Tensor] = {}

    def function(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        key = storage.data_ptr(), storage.nbytes()
        if key not in moved:
            moved[key] = move(torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage))
        target = torch.empty(0, dtype=tensor.dtype, device=moved[key].device)
        # the same elements in the same order, wherever `move` has put them
        return target.set_(moved[key].untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())

    return function
