"""Reads frozen weights from a base model's files, tensor by tensor.

The files are those that transformers loads: one file, or those that an index names. Others beside them, which an older
download or other weights left, are not read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ilvr_ds.config import ModelConfig
from ilvr_ds.errors import UserError, first_line
from ilvr_ds.model.hub import model_folder


def tower_weights(settings: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """The tower's weights by the names of a released model (`visual.*`), in the precision of the files.

    Raises UserError where the base has none: randomly initialised ones are stored nowhere.
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


def check_weights(path: str) -> None:
    """Raise UserError where the weights at `path` are ambiguous: two layouts, or a name twice."""
    for _ in _named(path):
        pass


def _tensors(settings: ModelConfig, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """The weights with a prefix, `visual.` or `layers.`, whichever layout the files have."""
    for name, read in _named(settings.path):
        if name.startswith(prefix):
            yield name, read()


def _named(path: str) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """All weights: bare name, and a function that reads the weight until the iterator moves on."""
    seen: dict[str, Path] = {}
    for file, expected in _files(Path(model_folder(path))).items():
        names = []
        for name, read in _of_file(file):
            names.append(name)
            bare = _bare(name)
            if bare in seen:
                raise UserError(f"model.path: {file}: holds {bare} again, which {seen[bare].name} has too")
            seen[bare] = file
            yield bare, read
        if missing := sorted(expected.difference(names)):
            raise UserError(
                f"model.path: {file}: lacks {len(missing)} weights that the index places there, the first {missing[0]}"
            )


def _files(folder: Path) -> dict[Path, set[str]]:
    """The weight files, and the names that the index places in each. Raises UserError for two layouts, and for adapters
    of peft: transformers would read the weights that they name as their base, and not those beside them."""
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"model.path: {folder / 'adapter_config.json'} stands for adapters on another base; merge them into it, or "
            "move the file away"
        )
    for single, index in (
        ("model.safetensors", "model.safetensors.index.json"),
        ("pytorch_model.bin", "pytorch_model.bin.index.json"),
    ):
        if not (folder / index).is_file():
            if (folder / single).is_file():
                return {folder / single: set()}
            continue
        files: dict[Path, set[str]] = {}
        try:
            for name, file in json.loads((folder / index).read_text())["weight_map"].items():
                files.setdefault(folder / file, set()).add(name)
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"model.path: {folder / index} is no index of weights ({error})") from error
        if (folder / single).is_file() and folder / single not in files:
            raise UserError(f"model.path: {folder} holds {single} and {index}, which does not name it; move one away")
        return dict(sorted(files.items()))
    raise UserError(
        f"model.path: the weights at '{folder}' cannot be read (neither model.safetensors nor an index is there)"
    )


def _of_file(file: Path) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """The weights in a file: name, and a function that reads the weight until the iterator moves on."""
    if file.suffix != ".safetensors":
        try:
            weights = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        except (OSError, RuntimeError, UnpicklingError) as error:
            raise _unreadable(file, first_line(error)) from error
        for name, tensor in weights.items():
            yield name, partial(_same, tensor)
        return
    try:
        opened = safe_open(file, "pt")
    except (OSError, SafetensorError) as error:
        raise _unreadable(file, str(error)) from error
    with opened as tensors:
        for name in tensors.keys():  # noqa: SIM118 - it is no dictionary
            yield name, partial(tensors.get_tensor, name)


def _unreadable(file: Path, reason: str) -> UserError:
    return UserError(f"model.path: the weights at '{file.parent}' cannot be read ({file.name}: {reason})")


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _bare(name: str) -> str:
    return name.removeprefix("model.").removeprefix("language_model.")
