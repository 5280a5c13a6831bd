"""Checkpoints: everything that a run needs to go on as if it had never stopped.

    checkpoints/step-00000100/
      state.json                  step, loader position, recipe, MLflow run, world size
      student/                    DeepSpeed's files: weights, optimizer, loss scale
      teacher-rank-00000.safetensors, rng-rank-00000.pt

A checkpoint is written under a name that ends in `.partial` and renamed when every rank has finished, so that a
folder with a plain name is whole.
"""

from __future__ import annotations

import io
import json
import random
import re
import shutil
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from ilvr_ds import dist
from ilvr_ds.config import Recipe
from ilvr_ds.distill.momentum import MomentumShards
from ilvr_ds.errors import UserError

_FIXED = ("train.stage", "train.precision", "model.latent_size", "model.lora_rank", "model.lora_targets", "optim.name")
_FREE = ("run.", "evaluation.", "checkpoint.", "tracking.", "data.shards", "data.eval_shards", "data.num_workers")
_NAME = re.compile(r"step-(\d{8})")
STATE_FILE = "state.json"


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after `step` optimizer steps."""
    return f"step-{step:08d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if _NAME.fullmatch(p.name) and (p / STATE_FILE).is_file())


def find_checkpoint(recipe: Recipe) -> Path | None:
    """The checkpoint that `checkpoint.resume` asks for, or None to start anew; raises UserError."""
    wanted = recipe.checkpoint.resume
    folder = recipe.run_dir / "checkpoints"
    if wanted == "never":
        if list_checkpoints(folder):
            raise UserError(f"checkpoint.resume is never, but {folder} holds checkpoints; take another run.name")
        return None
    if wanted in ("auto", "must"):
        found = list_checkpoints(folder)
        if not found and wanted == "must":
            raise UserError(f"checkpoint.resume is must, but {folder} holds no complete checkpoint")
        return found[-1] if found else None
    path = Path(wanted)
    if not (path / STATE_FILE).is_file():
        raise UserError(f"checkpoint.resume: '{wanted}' is not a checkpoint; valid: auto, must, never, or a folder")
    return path


def saved_state(path: Path) -> dict[str, Any]:
    """What `state.json` of a checkpoint says."""
    state: dict[str, Any] = json.loads((path / STATE_FILE).read_text())
    return state


def check_fits(path: Path, recipe: Recipe) -> dict[str, Any]:
    """What `state.json` of a checkpoint says, if this job can go on from it; warns of settings that changed since.

    Raises UserError for another number of ranks, or other settings that weights, samples or optimizer state depend on.
    """
    state = saved_state(path)
    if state["world_size"] != dist.world_size():
        raise UserError(
            f"{path}: saved by {state['world_size']} ranks, this job has {dist.world_size()}; start as many as then"
        )
    now = recipe.flat()
    before = {f"{section}.{key}": value for section, keys in state["recipe"].items() for key, value in keys.items()}
    changed = [key for key in now if before.get(key) != now[key] and not key.startswith(_FREE)]
    for key in changed:
        was = f"{key} = {before.get(key)}, this run has {now[key]}"
        if key in _FIXED:
            raise UserError(f"{path}: made with {was}; go on with the old value, or take another run.name")
        dist.warn("going on with other settings: the checkpoint was made with %s", was)
    return state


def save_checkpoint(
    folder: Path, step: int, student: Any, names: list[str], teacher: MomentumShards, state: dict[str, Any]
) -> Path:
    """Write a checkpoint after `step` optimizer steps (collective); `state` must be JSON. Returns its folder."""
    final = folder / checkpoint_name(step)
    partial = final.with_suffix(".partial")
    if dist.is_main():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    student.save_checkpoint(str(partial), tag="student", save_latest=False)
    rank = dist.rank()
    save_file(dict(zip(names, teacher.state(), strict=True)), partial / f"teacher-rank-{rank:05d}.safetensors")
    torch.save(_random_state(), partial / f"rng-rank-{rank:05d}.pt")
    dist.barrier()
    if dist.is_main():
        content = {"step": step, "world_size": dist.world_size(), **state}
        (partial / STATE_FILE).write_text(json.dumps(content, indent=1))
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
    dist.barrier()
    return final


def load_checkpoint(path: Path, student: Any, names: list[str], teacher: MomentumShards) -> dict[str, Any]:
    """Restore student, teacher and random numbers (collective); returns the state that was saved."""
    state = saved_state(path)
    loaded, _ = student.load_checkpoint(str(path), tag="student")
    if loaded is None:
        raise UserError(f"{path}: DeepSpeed found no student in it")
    rank = dist.rank()
    shards = load_file(path / f"teacher-rank-{rank:05d}.safetensors")
    if sorted(shards) != sorted(names):
        raise UserError(f"{path}: the stored teacher has other weights than this recipe trains")
    teacher.load_state([shards[name] for name in names])
    _set_random_state(torch.load(path / f"rng-rank-{rank:05d}.pt", weights_only=False))
    return state


def remove_old(folder: Path, keep_last: int) -> list[Path]:
    """Delete all but the newest `keep_last` complete checkpoints (0 keeps all) on the main rank."""
    if not keep_last or not dist.is_main():
        return []
    old = list_checkpoints(folder)[:-keep_last]
    for path in old:
        shutil.rmtree(path)
    return old


def _random_state() -> dict[str, Any]:
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
    read; under ZeRO-2 DeepSpeed joins all of them first. Frozen weights (with LoRA) are held in their own precision.
    """
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # it reports its progress in prints
            weights = get_fp32_state_dict_from_zero_checkpoint(str(path), tag="student", lazy_mode=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{path}: DeepSpeed cannot read the student ({str(error).strip().splitlines()[0]})") from error
    return dict(weights)
