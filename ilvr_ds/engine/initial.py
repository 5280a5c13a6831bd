"""Starting from the weights of another run: `model.init_from`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import nn

from ilvr_ds import dist
from ilvr_ds.checkpoint.compatible import check_base_is_the_same
from ilvr_ds.checkpoint.files import STATE_FILE, list_checkpoints, newest_intact, saved_state, teacher_file
from ilvr_ds.checkpoint.load import read_student_weights
from ilvr_ds.checkpoint.reshard import teacher_slices
from ilvr_ds.config import Recipe
from ilvr_ds.distill.ema import MomentumShards
from ilvr_ds.errors import UserError

logger = logging.getLogger("ilvr_ds")


def find_initial(recipe: Recipe) -> Path | None:
    """The checkpoint that `model.init_from` names, of a run the newest intact one, or None (collective).

    Raises UserError where it is none, is damaged, or does not fit.
    """
    wanted = recipe.model.init_from
    if wanted is None:
        return None
    candidates = dist.decided_by_main(lambda: _candidates(wanted))
    try:
        path = newest_intact(candidates)
    except UserError as error:
        raise UserError(f"model.init_from: {error}") from error
    dist.decided_by_main(lambda: _check_settings(path, recipe))
    return path


def _candidates(wanted: str) -> list[Path]:
    """The checkpoint of that name, or those of the run, oldest first."""
    candidates = list_checkpoints(Path(wanted) / "checkpoints") or [Path(wanted)]
    if not (candidates[-1] / STATE_FILE).is_file():
        raise UserError(
            f"model.init_from: '{wanted}' is neither a checkpoint nor the folder of a run that has one; "
            "expected RUN or RUN/checkpoints/step-00001000"
        )
    return candidates


def _check_settings(path: Path, recipe: Recipe) -> None:
    before = saved_state(path)["recipe"]["model"]
    now = recipe.to_dict()["model"]
    before.setdefault("lora_base", "full")  # checkpoints from before it was a key
    scale = ("lora_alpha",) if recipe.model.lora_rank else ()
    for key in ("latent_size", "lora_rank", "lora_base", "lora_targets", *scale):
        if before[key] != now[key]:
            raise UserError(f"model.init_from: {path} was made with model.{key} = {before[key]}, here it is {now[key]}")
    check_base_is_the_same(path, before, recipe)


def load_average(path: Path, names: list[str], shards: MomentumShards) -> None:
    """Load the EMA of `names` from a checkpoint of any number of ranks into a teacher.

    A checkpoint without one, as after a stage 2 that had no teacher, leaves the teacher equal to the student.
    """
    state = saved_state(path)
    if teacher_file(0) in state["files"]:
        sizes = [shard.numel() for shard in shards.weights]
        shards.load_state(teacher_slices(path, names, sizes, state["world_size"]))
        logger.info("the teacher starts from its average in %s", path)


@torch.no_grad()
def load_weights(path: Path, root: nn.Module) -> None:
    """Copy a checkpoint's float32 weights into the root module of an engine that is not started yet (collective).

    Only the main rank reads, one weight at a time. Sharded weights are distributed here; whole ones when DeepSpeed
    starts the engine, which broadcasts the main rank's. Raises UserError where weights are missing
    or have other shapes.
    """
    shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in root.named_parameters()}
    stored: dict[str, Any] = {}

    def read() -> None:
        stored.update(read_student_weights(path))
        for name, shape in shapes.items():
            if name not in stored:
                raise UserError(f"model.init_from: {path} has no weight '{name}'")
            if tuple(stored[name].shape) != shape:
                raise UserError(
                    f"model.init_from: '{name}' has shape {tuple(stored[name].shape)} in {path}, {shape} in this model"
                )
        logger.info("starting from the weights of %s", path)

    dist.decided_by_main(read)
    for name, parameter in root.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if dist.is_main():
                parameter.copy_(stored[name].contiguous())
