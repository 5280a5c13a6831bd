"""The state that DeepSpeed would write, taken from it without a file, and copied to host memory."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo, CheckpointEngine


class _Capture(CheckpointEngine):  # type: ignore[misc]
    """Takes what DeepSpeed would write: file name -> content, which is live and changes with the next step."""

    def __init__(self) -> None:
        super().__init__()
        self.name = "capture"
        self.files: dict[str, Any] = {}

    def create(self, info: CheckpointCommitInfo) -> None:
        """Nothing to prepare."""

    def save(self, state_dict: Any, path: str) -> None:
        self.files[Path(path).name] = state_dict

    def load(self, path: str, map_location: Any = None) -> Any:
        raise NotImplementedError("this engine only takes states")

    def commit(self, info: CheckpointCommitInfo) -> bool:
        return True


class TorchFile:
    """Writes `content` with torch.save."""

    def __init__(self, content: Any) -> None:
        self.content = content

    def __call__(self, path: Path) -> None:
        """Write the file."""
        torch.save(self.content, path)

    def size(self) -> int:
        """Bytes of the tensors."""
        sizes: list[int] = []
        _map_tensors(self.content, lambda tensor: sizes.append(tensor.numel() * tensor.element_size()))
        return sum(sizes)


def student_files(student: Any) -> dict[str, Any]:
    """What DeepSpeed would write on this rank, without a file being written (collective)."""
    before, capture = student.checkpoint_engine, _Capture()
    student.checkpoint_engine = capture
    try:
        with tempfile.TemporaryDirectory() as scratch:  # rank 0 leaves its conversion scripts there
            student.save_checkpoint(scratch, tag="student", save_latest=False)
    finally:
        student.checkpoint_engine = before
    return capture.files


def copy_to_host(tree: Any) -> Any:
    """A copy in host memory, with each tensor once though it occurs several times; other objects that training changes,
    as fp16's loss scaler, are copied too."""
    copies: dict[Any, torch.Tensor] = {}

    def copied(tensor: torch.Tensor) -> torch.Tensor:
        key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.device)
        if key not in copies:
            copies[key] = tensor.detach().to("cpu", copy=True)
        return copies[key]

    return _map_tensors(tree, copied, copy.deepcopy)


def _map_tensors(
    tree: Any, function: Callable[[torch.Tensor], Any], otherwise: Callable[[Any], Any] = lambda other: other
) -> Any:
    """Nested dictionaries, lists and tuples with `function` applied to tensors, `otherwise` to everything else."""
    if isinstance(tree, torch.Tensor):
        return function(tree)
    if isinstance(tree, dict):
        mapped = {key: _map_tensors(value, function, otherwise) for key, value in tree.items()}
        return type(tree)(mapped) if type(tree) is not dict else mapped
    if isinstance(tree, (list, tuple)) and not hasattr(tree, "_fields"):
        return type(tree)(_map_tensors(value, function, otherwise) for value in tree)
    return otherwise(tree)
