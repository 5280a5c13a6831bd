"""Latents of finished samples on disk: a donor's are needed with another batch, maybe on another rank.

latents/00000012.safetensors    own and target latents of the batch whose first sample has number 12
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import count, takewhile
from pathlib import Path
from typing import Literal

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from ilvr_ds.whole_files import whole_file

Kind = Literal["own", "target"]


class LatentStore:
    """Latents of whole batches; `batches` are the numbers of the samples of each."""

    def __init__(self, folder: Path, batches: Sequence[Sequence[int]]) -> None:
        self.folder = folder / "latents"
        self._first = {number: numbers[0] for numbers in batches for number in numbers}

    def write(self, latents: Mapping[Kind, Mapping[int, Sequence[Tensor]]]) -> None:
        """A whole batch: by kind and number of the sample, of each segment [K, D]."""
        tensors = {
            f"{kind}.{number}.{segment}": tensor.cpu().contiguous()
            for kind, samples in latents.items()
            for number, segments in samples.items()
            for segment, tensor in enumerate(segments)
        }
        self.folder.mkdir(exist_ok=True)
        file = self._file(min(next(iter(latents.values()))))
        with whole_file(file) as partial:
            partial.write_bytes(save(tensors))  # save_file has an error of its own for a full disk

    def read(self, kind: Kind, numbers: Sequence[int | None]) -> list[list[Tensor]]:
        """Of each sample the latents of its segments; [] for None."""
        found: list[list[Tensor]] = []
        for number in numbers:
            if number is None:
                found.append([])
                continue
            with safe_open(self._file(number), "pt") as file:
                names = set(file.keys())
                mine = takewhile(names.__contains__, (f"{kind}.{number}.{segment}" for segment in count()))
                found.append([file.get_tensor(name) for name in mine])
        return found

    def _file(self, number: int) -> Path:
        return self.folder / f"{self._first[number]:08d}.safetensors"
