"""Frozen weights out of a base model's files, tensor by tensor: of the vision tower, of layers kept in 4 bits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
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
    for name, tensor in _tensors(settings, "visual."):
        yield name, tensor
        count += 1
    if count == 0:
        raise UserError(f"model.path: '{settings.path}' holds no weights of a vision tower")


def linear_weights(settings: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """The matrices of the decoder layers (`model.layers.*.weight`), in the precision of the files."""
    for name, tensor in _tensors(settings, "layers."):
        if tensor.dim() == 2:
            yield f"model.{name}", tensor


def _tensors(settings: ModelConfig, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """The weights whose names begin so, and no others: `visual.*`, `layers.*`, whichever layout the files have."""
    folder = Path(model_folder(settings.path))
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        try:
            opened = safe_open(file, "pt")
        except (OSError, SafetensorError) as error:
            raise UserError(f"model.path: {file} cannot be read ({error})") from error
        with opened as tensors:
            for name in tensors.keys():  # noqa: SIM118 - it is no dictionary
                if _bare(name).startswith(prefix):
                    yield _bare(name), tensors.get_tensor(name)
    for file in [] if files else sorted(folder.glob("pytorch_model*.bin")):
        for name, tensor in torch.load(file, map_location="cpu", mmap=True, weights_only=True).items():
            if _bare(name).startswith(prefix):
                yield _bare(name), tensor


def _bare(name: str) -> str:
    return name.removeprefix("model.").removeprefix("language_model.")
