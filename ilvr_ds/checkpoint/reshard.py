"""Resuming with another number of ranks, another ZeRO stage, or other settings of its layout.

The student goes through DeepSpeed's universal checkpoint, which holds each weight and its moments whole. It has
no frozen weights, which are read from the checkpoint itself, and no teacher, whose slices are cut anew here. Random
states of ranks cannot be split: they start anew; only LoRA's initial weights are drawn from them.
"""

from __future__ import annotations

import json
import logging
import shutil
from argparse import Namespace
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.checkpoint.constants import (
    DS_VERSION,
    LOSS_SCALER,
    OPTIMIZER_STATE_DICT,
    PARAM,
    PARAM_GROUPS,
    PARAM_SHAPES,
)
from deepspeed.checkpoint.ds_to_universal import main as convert_to_universal
from safetensors import safe_open
from torch import Tensor

from ilvr_ds import dist
from ilvr_ds.checkpoint.files import saved_state, teacher_file
from ilvr_ds.checkpoint.layout import Layout
from ilvr_ds.checkpoint.load import load_checkpoint, read_student_weights
from ilvr_ds.config import Recipe
from ilvr_ds.distill.ema import MomentumShards
from ilvr_ds.errors import UserError, counted, first_line

logger = logging.getLogger("ilvr_ds")
WORKERS = 4
"""Processes that convert."""


def needs_resharding(state: dict[str, Any], layout: Layout) -> bool:
    """Whether a checkpoint, by its state as check_fits returns it, has other slices than this job."""
    before = state["world_size"], state["zero_stage"], state["layout"]
    return before != (dist.world_size(), layout.zero_stage, layout.settings)


def reshard(path: Path, state: dict[str, Any], layout: Layout, recipe: Recipe) -> None:
    """Write the universal form of a checkpoint's student into the folder of this run, which no other process trains,
    while several may go on from the checkpoint (collective); raises UserError."""
    before, after = state["layout"], layout.settings
    was = f"{counted(state['world_size'], 'rank')} under ZeRO-{state['zero_stage']}{_others(before, after)}"
    now = f"{dist.world_size()} under ZeRO-{layout.zero_stage}{_others(after, before)}"
    if recipe.optim.name.endswith("8bit"):
        raise UserError(f"{path}: saved by {was}, this job has {now}; the state of {recipe.optim.name} cannot be split")
    logger.info("%s was saved by %s, this job has %s: converting", path.name, was, now)
    dist.decided_by_main(lambda: _convert(path, universal_form(recipe), state["zero_stage"], layout.zero_stage))


def _others(layout: dict[str, Any], than: dict[str, Any]) -> str:
    """The settings of a layout that another, of the same stage, has otherwise."""
    changed = [f"{key} {json.dumps(value)}" for key, value in layout.items() if than.get(key, value) != value]
    return f" with {', '.join(changed)}" if changed else ""


def universal_form(recipe: Recipe) -> Path:
    """Where `reshard` puts it; what a killed job left there is cleared away when the next checkpoint is begun."""
    return recipe.run_dir / "checkpoints" / "universal.partial"


def load_resharded(
    path: Path, universal: Path, student: Any, names: list[str], teacher: MomentumShards | None
) -> dict[str, Any]:
    """`load_checkpoint` for a checkpoint that `reshard` converted; deletes the converted form (collective)."""
    ranks = saved_state(path)["world_size"]
    sizes = [shard.numel() for shard in teacher.weights] if teacher else []
    slices = teacher_slices(path, names, sizes, ranks) if teacher else []
    state = load_checkpoint(path, student, names, teacher, universal, slices)
    _own_step_counters(student.optimizer.optimizer)
    _load_frozen(path, student.module)
    dist.barrier()
    if dist.is_main():
        shutil.rmtree(universal)
    return state


@torch.no_grad()
def _load_frozen(path: Path, module: Any) -> None:
    """Frozen weights as the checkpoint has them; the main rank reads them, one at a time, for all."""
    frozen = {name: parameter for name, parameter in module.named_parameters() if not parameter.requires_grad}
    stored: dict[str, Any] = {}
    dist.decided_by_main(lambda: stored.update(read_student_weights(path)) if frozen else None)
    for name, parameter in frozen.items():
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if dist.is_main():
                parameter.copy_(stored[name].contiguous())
            if not hasattr(parameter, "ds_tensor"):
                dist.broadcast_from_main(parameter.data)


def _convert(path: Path, universal: Path, old_stage: int, new_stage: int) -> None:
    shutil.rmtree(universal, ignore_errors=True)
    settings = Namespace(
        input_folder=str(path / "student"),
        output_folder=str(universal),
        num_extract_workers=WORKERS,
        num_merge_workers=WORKERS,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    try:
        with redirect_stdout(StringIO()):  # it prints each file
            convert_to_universal(settings)
        _translate(universal, old_stage, new_stage)
        (universal.parent / "latest_universal").unlink()  # left by the conversion; it names a folder for a while
    except (OSError, RuntimeError) as error:  # a full disk is to torch a RuntimeError
        raise UserError(f"{universal}: {first_line(error)}; conversion needs room for the checkpoint") from error


def _translate(folder: Path, old_stage: int, new_stage: int) -> None:
    """The lower stages want each weight in its shape, and each stage its counters in a place of its own."""
    counters = min(folder.glob("*mp_rank_00_model_states.pt"))
    shapes: dict[str, Any] = {}
    for group in torch.load(counters, map_location="cpu", weights_only=False)[PARAM_SHAPES]:
        shapes |= group
    counters.rename(folder / ("zero_pp_rank_0_" * (new_stage == 3) + "mp_rank_00_model_states.pt"))
    if (old_stage == 3) == (new_stage == 3):
        return
    common = folder / "zero" / "optimizer_state.pt"
    stored = torch.load(common, map_location="cpu", weights_only=False)
    state = {key: stored[key] for key in (LOSS_SCALER, "dynamic_loss_scale", "overflow", PARAM_GROUPS)}
    if old_stage == 3:
        step = next(iter(stored[OPTIMIZER_STATE_DICT]["state"].values()))["step"]
        state[DS_VERSION] = deepspeed.__version__
    else:
        step = torch.load(folder / "zero" / next(iter(shapes)) / "step.pt", weights_only=False)
        state[OPTIMIZER_STATE_DICT] = {"state": {0: {"step": step}}, PARAM_GROUPS: stored[PARAM_GROUPS]}
    torch.save(state, common)
    for name, shape in shapes.items() if old_stage == 3 else ():
        for file in (folder / "zero" / name).glob("*.pt"):
            torch.save({PARAM: torch.load(file, weights_only=False).view(shape)}, file)
        torch.save(step, folder / "zero" / name / "step.pt")


def _own_step_counters(optimizer: torch.optim.Optimizer) -> None:
    """DeepSpeed hands one counter, on the CPU, to all sub-groups: each would count it up, and fused AdamW refuse it."""
    for weight, state in optimizer.state.items():
        if isinstance(state.get("step"), Tensor):
            device = weight.device if optimizer.defaults.get("fused") else torch.device("cpu")
            state["step"] = state["step"].to(device, copy=True)


def teacher_slices(path: Path, names: list[str], sizes: list[int], ranks: int) -> list[Tensor]:
    """This rank's slices, of `sizes` elements, of the averages that `ranks` ranks saved below `path`.

    Slices are cut evenly and padded at the end, then and now; what stands in the padding does not matter.
    """
    files: list[Any] = [safe_open(path / teacher_file(rank), framework="pt") for rank in range(ranks)]
    stored = set(files[0].keys())
    if stored != set(names):
        raise UserError(f"{path}: the stored teacher has other weights than this recipe trains")
    slices = []
    for name, size in zip(names, sizes, strict=True):
        start, stop = dist.rank() * size, (dist.rank() + 1) * size
        old = files[0].get_slice(name).get_shape()[0]
        parts = [
            file.get_slice(name)[max(start, rank * old) - rank * old : min(stop, (rank + 1) * old) - rank * old]
            for rank, file in enumerate(files)
            if max(start, rank * old) < min(stop, (rank + 1) * old)
        ]
        values = torch.cat(parts) if parts else torch.empty(0)
        slices.append(torch.nn.functional.pad(values, (0, size - values.numel())))
    return slices
