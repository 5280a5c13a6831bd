"""Checkpoints: everything that a run needs to go on as if it had never stopped.

    checkpoints/step-00000100/
      state.json                  step, loader position, recipe, MLflow run, world size, hub's commit of the base and
                                  fingerprints of what of it is not here, size and CRC-32 of each file
      student/                    DeepSpeed's files: weights, optimizer, loss scale
      teacher-rank-00000.safetensors, rng-rank-00000.pt

writer.py writes them, find.py chooses one; this file checks, loads and removes them.
"""

from __future__ import annotations

import io
import json
import random
import re
import shutil
import zlib
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from ilvr_ds import dist
from ilvr_ds.config import Recipe
from ilvr_ds.distill.ema import MomentumShards
from ilvr_ds.errors import UserError, counted

CHUNK = 2**24
"""Bytes that are summed at a time."""
_FIXED = (
    "train.stage",
    "train.precision",
    "model.latent_size",
    "model.lora_rank",
    "model.lora_base",
    "model.lora_targets",
    "optim.name",
)
_FREE = (
    "run.",
    "evaluation.",
    "checkpoint.",
    "tracking.",
    "data.shards",
    "data.eval_shards",
    "data.num_workers",
    "model.cuda_graphs",
)
_RENAMED = {("data", "shuffle_window"): "shuffle_buffer"}
"""Keys of the recipe by the names that older checkpoints have for them."""
_NAME = re.compile(r"step-(\d{8})")
_ASIDE = re.compile(r"step-(\d{8})\.aside-\d+")
STATE_FILE = "state.json"
TOWER, LAYERS = "vision tower", "layers in 4 bits"
"""What may be frozen and in no checkpoint."""
UNIVERSAL = "universal"
"""Folder of the student's universal form within a checkpoint, while a job goes on with other slices."""


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after `step` optimizer steps."""
    return f"step-{step:08d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if _NAME.fullmatch(p.name) and (p / STATE_FILE).is_file())


def first_fault(path: Path) -> str | None:
    """What is wrong with the first damaged file of a checkpoint, or None (collective: ranks share the reading)."""
    fault, files = None, []
    try:
        state = _read_state(path)
        files = sorted(state["files"].items())
        if state.pop("checksum") != checksum_of(state):
            fault = f"{path / STATE_FILE}: damaged (its checksum is another)"
    except (OSError, ValueError, KeyError, AttributeError) as error:  # perhaps on this rank alone
        fault = f"{path / STATE_FILE}: damaged ({type(error).__name__})"
    for name, (size, checksum) in files[dist.rank() :: dist.world_size()]:
        fault = fault or _fault(path / name, size, checksum)
    return next((found for found in dist.gather_on_host(fault) if found), None)


def _fault(file: Path, size: int, checksum: int) -> str | None:
    try:
        if file.stat().st_size != size:
            return f"{file}: damaged ({file.stat().st_size} bytes instead of {size})"
        if size_and_checksum(file) != (size, checksum):
            return f"{file}: damaged (its checksum is another)"
    except OSError as error:
        return f"{file}: {error.strerror}"
    return None


def checksum_of(state: dict[str, Any]) -> int:
    """CRC-32 of a `state.json` without its checksum."""
    return zlib.crc32(json.dumps(state, sort_keys=True).encode())


def size_and_checksum(file: Path) -> tuple[int, int]:
    """Size in bytes and CRC-32 of a file."""
    size = checksum = 0
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            size += len(chunk)
            checksum = zlib.crc32(chunk, checksum)
    return size, checksum


def saved_state(path: Path) -> dict[str, Any]:
    """What `state.json` of a checkpoint says; renamed keys of the recipe have today's names."""
    state = _read_state(path)
    for (section, old), new in _RENAMED.items():
        loader, keys = state.get("loader", {}), state.get("recipe", {}).get(section, {})
        if old in keys:
            keys[new] = keys.pop(old)
        if f"{section}.{old}" in loader:
            loader[f"{section}.{new}"] = loader.pop(f"{section}.{old}")
    return state


def _read_state(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((path / STATE_FILE).read_text())
    return state


def check_fits(path: Path, recipe: Recipe) -> dict[str, Any]:
    """What `state.json` of a checkpoint says, if this job can go on from it; warns of settings that changed since.

    Raises UserError for another batch, or other settings that weights, samples or optimizer state depend on.
    """
    state = saved_state(path)
    _check_batch(path, recipe, state["loader"]["samples per step"])
    check_base_is_the_same(path, state["recipe"]["model"], recipe)
    now = recipe.flat()
    if recipe.train.has_free_latents and recipe.has_teacher and teacher_file(0) not in state["files"]:
        raise UserError(
            f"{path}: made without a teacher; go on with loss.align_weight=0 and loss.contrastive_weight=0 (and, if "
            "it is older than that key, train.latent_gradient=full), or name it in model.init_from of another run.name"
        )
    before: dict[str, Any] = {"model.lora_base": "full", "train.gradient_precision": "model"}  # before they were keys
    before["train.latent_gradient"] = "full" if recipe.train.has_free_latents else recipe.train.latent_gradient
    before |= {f"{section}.{key}": value for section, keys in state["recipe"].items() for key, value in keys.items()}
    changed = [key for key in now if before.get(key) != now[key] and not key.startswith(_FREE)]
    for key in changed:
        was = f"{key} = {before.get(key)}, this run has {now[key]}"
        if key in _FIXED:
            raise UserError(f"{path}: made with {was}; go on with the old value, or take another run.name")
        dist.warn("going on with other settings: the checkpoint was made with %s", was)
    return state


def check_frozen_is_the_same(path: Path, found: dict[str, str], model: str) -> None:
    """Raise UserError where frozen weights that no checkpoint holds are others than those that a checkpoint was made
    with. found: their fingerprints, by what they are; model: the folder that they come from."""
    before = saved_state(path).get("frozen", {})  # checkpoints from before it was kept
    for what in before.keys() & found.keys():
        if before[what] != found[what]:
            raise UserError(
                f"{path}: made with another {what} than {model} holds now, and checkpoints do not hold it: give the "
                "model of then as model.path"
            )


def commit_of_base(path: Path | None, name: str) -> str | None:
    """The hub's commit of the model `name` that the run of a checkpoint has used, if it was of this name."""
    if path is None:
        return None
    state = saved_state(path)
    commit: str | None = state.get("model_commit")
    return commit if state["recipe"]["model"]["path"] == name else None


def check_base_is_the_same(path: Path, before: dict[str, Any], recipe: Recipe) -> None:
    """Raise UserError where a base in 4 bits, which no checkpoint holds, may be another than a checkpoint's `model`."""
    model = recipe.model
    if model.lora_base == "full":
        return
    if model.random_init:
        raise UserError(f"{path}: model.random_init drew a base for model.lora_base {model.lora_base}, stored nowhere")
    if before["path"] != model.path:
        raise UserError(
            f"{path}: made with model.path = {before['path']}, this run has {model.path}; with model.lora_base "
            f"{model.lora_base} checkpoints do not hold the base: give the same path"
        )


def _check_batch(path: Path, recipe: Recipe, wanted: int) -> None:
    """The samples of each step must stay the same, whatever the number of ranks."""
    micro, ranks = recipe.train.micro_batch_size, dist.world_size()
    if micro * recipe.train.grad_accum_steps * ranks == wanted:
        return
    advice = "take a micro-batch and a number of ranks whose product divides it"
    if wanted % (micro * ranks) == 0:
        advice = f"set train.grad_accum_steps={wanted // (micro * ranks)}"
    raise UserError(
        f"{path}: made with {wanted} samples a step, this job has {counted(ranks, 'rank')} x "
        f"train.micro_batch_size {micro} x train.grad_accum_steps {recipe.train.grad_accum_steps}; {advice}"
    )


def load_checkpoint(
    path: Path, student: Any, names: list[str], teacher: MomentumShards | None, slices: list[Tensor] | None = None
) -> dict[str, Any]:
    """Restore student, teacher and random numbers (collective); returns the state that was saved.

    slices: the teacher's averages as checkpoint_reshard.py cut them for this job, where it has other slices than the
    job that saved; the student is then read from its universal form.
    """
    state = saved_state(path)
    loaded, _ = student.load_checkpoint(str(path), tag="student" if slices is None else UNIVERSAL)
    if loaded is None:
        raise UserError(f"{path}: DeepSpeed found no student in it")
    if slices is None:
        slices = _teacher_of_rank(path, names) if teacher else []
        _set_random_state(torch.load(path / f"rng-rank-{dist.rank():05d}.pt", weights_only=False))
    if teacher:
        teacher.load_state(slices)
    return state


def _teacher_of_rank(path: Path, names: list[str]) -> list[Tensor]:
    stored = load_file(path / teacher_file(dist.rank()))
    if sorted(stored) != sorted(names):
        raise UserError(f"{path}: the stored teacher has other weights than this recipe trains")
    return [stored[name] for name in names]


def remove_old(folder: Path, keep_last: int, keep_every: int = 0) -> list[Path]:
    """Delete complete checkpoints (main rank only): all but the newest `keep_last` (0 keeps all) and those whose step
    is a multiple of `keep_every`; and those set aside that the run has come as far as again. Returns what was
    deleted."""
    found = list_checkpoints(folder)
    if not keep_last or not found:
        return []
    old = [path for path in found[:-keep_last] if not keep_every or int(path.name.removeprefix("step-")) % keep_every]
    reached = int(found[-1].name.removeprefix("step-"))
    aside = [(path, _ASIDE.fullmatch(path.name)) for path in sorted(folder.iterdir())]
    old += [path for path, name in aside if name and int(name[1]) <= reached]
    for path in old:
        (path / STATE_FILE).unlink(missing_ok=True)  # a half-deleted checkpoint is never taken for a whole one
        shutil.rmtree(path)
    return old


def teacher_file(rank: int) -> str:
    """Name of a rank's file of the teacher's averages."""
    return f"teacher-rank-{rank:05d}.safetensors"


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
    read; under ZeRO-2 DeepSpeed joins all of them first. Frozen weights (with LoRA) are held in their own precision.
    """
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # it reports its progress in prints
            weights = get_fp32_state_dict_from_zero_checkpoint(str(path), tag="student", lazy_mode=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{path}: DeepSpeed cannot read the student ({str(error).strip().splitlines()[0]})") from error
    return dict(weights)
