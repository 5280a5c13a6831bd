"""Starting from the weights of another run, which `model.init_from` names."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import nn

from ilvr_ds import dist
from ilvr_ds.checkpoint.files import saved_state, teacher_file
from ilvr_ds.checkpoint.load import read_student_weights
from ilvr_ds.checkpoint.reshard import teacher_slices
from ilvr_ds.distill.ema import MomentumShards
from ilvr_ds.errors import UserError

logger = logging.getLogger("ilvr_ds")


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
