"""A window on its way from a loader's worker: all its tensors in one piece of memory.

Each tensor that goes to another process takes a file descriptor in both, and a window has hundreds. One piece is one
descriptor, one allocation of pinned memory and one copy to the device (TensorTree.to).
"""

from __future__ import annotations

import resource
from dataclasses import dataclass, replace

import torch

from ilvr_ds.data.tensor_tree import Place
from ilvr_ds.data.window import Window

ALIGNMENT = 128
"""Tensors begin at multiples of this many bytes, like tensors with memory of their own: kernels may rely on it."""
OPEN_FILES = 65536
"""More file descriptors than a rank ever needs. Some limits are in the billions, and some programs count up to them."""


@dataclass(frozen=True)
class Parcel:
    """A window whose tensors have been taken out. Picklable; made in a worker, opened where it is used."""

    window: Window
    """Holds a Place where each tensor was."""
    memory: torch.Tensor
    """[bytes] uint8: the tensors, one after the other, each from a multiple of ALIGNMENT on"""

    @staticmethod
    def of(window: Window) -> Parcel:
        """Pack `window`; its values are copied."""
        tensors: list[torch.Tensor] = []
        places: list[Place] = []
        size = 0

        def placed(tensor: torch.Tensor) -> Place:
            nonlocal size
            tensors.append(tensor)
            places.append(Place(size, tensor.shape, tensor.dtype))
            size += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
            return places[-1]

        emptied = window.map(placed, host_too=True)
        parcel = Parcel(emptied, torch.empty(size, dtype=torch.uint8))
        for place, tensor in zip(places, tensors, strict=True):
            parcel._at(place).copy_(tensor)
        return parcel

    def pin_memory(self) -> Parcel:
        """The same in pinned memory (called by torch's DataLoader)."""
        return replace(self, memory=self.memory.pin_memory())

    def open(self) -> Window:
        """The window; its tensors are views of `memory`."""
        return self.window.map(self._at, host_too=True)

    def _at(self, place: Place) -> torch.Tensor:
        size = place.shape.numel() * place.dtype.itemsize
        return self.memory[place.start : place.start + size].view(place.dtype).view(place.shape)


def allow_open_files() -> None:
    """Raise this process's limit of open files, up to OPEN_FILES."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
