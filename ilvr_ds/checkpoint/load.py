"""Loading a checkpoint: student, teacher and random numbers, or the student's weights alone."""

from __future__ import annotations

import io
import random
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from ilvr_ds import dist
from ilvr_ds.checkpoint.files import saved_state, teacher_file
from ilvr_ds.distill.ema import MomentumShards
from ilvr_ds.errors import UserError, first_line


def load_checkpoint(
    path: Path,
    student: Any,
    names: list[str],
    teacher: MomentumShards | None,
    universal: Path | None = None,
    slices: Sequence[Tensor] = (),
) -> dict[str, Any]:
    """Restore student, teacher and random numbers (collective); returns the state that was saved.

    universal, slices: the student's universal form and the teacher's averages as reshard.py has made them for this
    job, where it has other slices than the job that saved.
    """
    state = saved_state(path)
    source = universal or path / "student"
    loaded, _ = student.load_checkpoint(str(source.parent), tag=source.name)
    if loaded is None:
        raise UserError(f"{path}: DeepSpeed found no student in it")
    if universal is None:
        slices = _teacher_of_rank(path, names) if teacher else []
        _set_random_state(torch.load(path / f"rng-rank-{dist.rank():05d}.pt", weights_only=False))
    if teacher:
        teacher.load_state(list(slices))
    return state


def _teacher_of_rank(path: Path, names: list[str]) -> list[Tensor]:
    stored = load_file(path / teacher_file(dist.rank()))
    if sorted(stored) != sorted(names):
        raise UserError(f"{path}: the stored teacher has other weights than this recipe trains")
    return [stored[name] for name in names]


def random_state() -> dict[str, Any]:
    """The global random numbers of this rank."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if dist.device().type == "cuda" else None,
    }


def _set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])


def read_student_weights(path: Path) -> dict[str, Any]:
    """The student's weights in a checkpoint by name, as lazy tensors: `.contiguous()` reads one.

    Trained weights are the fp32 master copies. Under ZeRO-3 each is put together from memory-mapped shards when it is
    read; under ZeRO-2 DeepSpeed joins all of them first. Frozen weights (with LoRA) are held in their own precision;
    ZeRO-1 keeps them beside the model's other weights, where DeepSpeed's reader does not look.
    """
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # it reports its progress in prints
            weights = get_fp32_state_dict_from_zero_checkpoint(str(path), tag="student", lazy_mode=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{path}: DeepSpeed cannot read the student ({first_line(error)})") from error
    return {**_beside(path / "student" / "mp_rank_00_model_states.pt"), **weights}


def _beside(states: Path) -> dict[str, Any]:
    """Weights that ZeRO-1 keeps in one file, frozen ones among them; none under higher stages, whose reader has all."""
    if not states.exists():
        return {}
    found: dict[str, Any] = torch.load(states, map_location="cpu", mmap=True, weights_only=False)
    module: dict[str, Any] = found["module"]
    return module if found["frozen_param_shapes"] is None else {}
