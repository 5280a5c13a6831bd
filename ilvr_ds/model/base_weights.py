"""The weights of the frozen vision tower out of a base model's files, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from ilvr_ds.config import ModelConfig
from ilvr_ds.errors import UserError
from ilvr_ds.model.hub import model_folder


def tower_weights(settings: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """The tower's weights by the names of a released model (`visual.*`), in the precision of the files.

    Raises UserError where the base has none: weights that a run drew at random are not in its checkpoints.
    """
    if settings.random_init:
        raise UserError("model.random_init: the vision tower is drawn at random and stored nowhere")
    count = 0
    for name, tensor in _tensors(Path(model_folder(settings.path))):
        yield name, tensor
        count += 1
    if count == 0:
        raise UserError(f"model.path: '{settings.path}' holds no weights of a vision tower")


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - it is no dictionary
                if hub := _hub_name(name):
                    yield hub, tensors.get_tensor(name)
    for file in [] if files else sorted(folder.glob("pytorch_model*.bin")):
        for name, tensor in torch.load(file, map_location="cpu", mmap=True, weights_only=True).items():
            if hub := _hub_name(name):
                yield hub, tensor


def _hub_name(name: str) -> str | None:
    bare = name.removeprefix("model.")
    return bare if bare.startswith("visual.") else None
