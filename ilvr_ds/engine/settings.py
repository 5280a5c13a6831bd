"""The settings of DeepSpeed's engines: the JSON file, checked, and what the recipe owns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import ValidationError

from ilvr_ds import shipped
from ilvr_ds.checkpoint.layout import Layout
from ilvr_ds.config import Recipe
from ilvr_ds.errors import UserError, nearest

_OURS = {
    "train_batch_size": "train.micro_batch_size and train.grad_accum_steps",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.grad_accum_steps",
    "gradient_clipping": "optim.max_grad_norm",
    "optimizer": "optim.name",
    "scheduler": "optim.schedule",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "activation_checkpointing": "model.activation_checkpointing",
    "communication_data_type": "train.gradient_precision",
    "data_types": "train.precision and train.gradient_precision",
}
_THEIRS = frozenset(
    {
        "zero_optimization",
        "prescale_gradients",
        "gradient_predivide_factor",
        "aio",
        "comms_logger",
        "flops_profiler",
        "wall_clock_breakdown",
        "memory_breakdown",
        "steps_per_print",
        "dump_state",
    }
)


def read_deepspeed_json(path: str, recipe_dir: Path | None = None) -> dict[str, Any]:
    """The ZeRO, offload and communication settings.

    A relative path is searched in the working directory, then beside the recipe; one that begins with a dot the other
    way round. A plain word names a file that comes with the package. Raises UserError for a missing
    file, bad JSON, an unknown key, a key that the recipe owns, or a value that DeepSpeed does not take.
    """
    places = [Path(path), *([recipe_dir / path] if recipe_dir else [])]
    if recipe_dir and path.startswith("."):
        places.reverse()  # "../x" in a recipe is meant from where the recipe lies
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        known = shipped.deepspeed_files()
        file = known.get(path)
    if file is None:
        hint = nearest(path, known) if shipped.is_name(path) else ""
        raise UserError(f"deepspeed.config: no file '{path}' (looked at {', '.join(map(str, places))}){hint}")
    try:
        settings: Any = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{file}:{error.lineno}: not valid JSON ({error.msg})") from error
    if not isinstance(settings, dict):
        raise UserError(f"{file}: expected a JSON object")
    for key in settings:
        if key in _OURS:
            raise UserError(f"{file}: '{key}' belongs in the recipe, as {_OURS[key]}; remove it here")
        if key not in _THEIRS:
            raise UserError(f"{file}: unknown key '{key}'{nearest(key, _THEIRS)}")
    _check_zero(settings.get("zero_optimization", {}), file)
    return settings


def layout_of(settings: dict[str, Any]) -> Layout:
    """The ZeRO stage in DeepSpeed's settings, with what decides the layout under it."""
    return Layout.of(settings.get("zero_optimization", {}))


def _check_zero(zero: Any, file: Path) -> None:
    if not isinstance(zero, dict):
        raise UserError(f"{file}: zero_optimization: expected a JSON object")
    fields = DeepSpeedZeroConfig.model_fields
    known = set(fields) | {field.alias for field in fields.values() if field.alias}
    for key in zero:
        if key not in known:
            raise UserError(f"{file}: unknown key 'zero_optimization.{key}'{nearest(key, known)}")
    try:
        checked = DeepSpeedZeroConfig(**zero)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, ("zero_optimization", *first["loc"])))
        raise UserError(f"{file}: {where}: {first['msg']}") from error
    if checked.stage == 0:
        raise UserError(f"{file}: zero_optimization.stage is 0; the teacher follows sharded weights: take 1, 2 or 3")
    if checked.round_robin_gradients:  # DeepSpeed (0.19) looks for each fp32 weight where another one lies then
        raise UserError(
            f"{file}: zero_optimization.round_robin_gradients: the teacher would follow wrong weights; remove it"
        )
    for name in ("offload_optimizer", "offload_param"):
        offload = getattr(checked, name)
        if offload and offload.device == "nvme":
            raise UserError(f"{file}: zero_optimization.{name}.device: nvme is not supported; valid: cpu, none")
    if checked.offload_param and checked.offload_param.device != "none" and checked.stage < 3:
        raise UserError(f"{file}: zero_optimization.offload_param needs stage 3, this is stage {checked.stage}")


def deepspeed_settings(recipe: Recipe, file_settings: dict[str, Any]) -> dict[str, Any]:
    """The student's DeepSpeed configuration: the JSON's settings and what the recipe owns."""
    precision = recipe.train.precision
    if recipe.model.activation_checkpointing == "selective":  # see model/layers/checkpointing.py
        zero = {**file_settings.get("zero_optimization", {}), "memory_efficient_linear": False}
        file_settings = {**file_settings, "zero_optimization": zero}
    # DeepSpeed needs both: where one is missing, sums of several ranks or micro-batches are rounded each time
    sums = precision if recipe.train.gradient_precision == "model" else recipe.train.gradient_precision
    return {
        "steps_per_print": 2**31,
        **file_settings,
        "communication_data_type": sums,
        "data_types": {"grad_accum_dtype": sums},
        "train_micro_batch_size_per_gpu": recipe.train.micro_batch_size,
        # filled by tokens, a step has more or fewer micro-batches: the trainer says which is its last, and 1 would
        # let DeepSpeed leave out what accumulates
        "gradient_accumulation_steps": max(recipe.train.grad_accum_steps, 2 if recipe.train.micro_batch_tokens else 1),
        "gradient_clipping": recipe.optim.max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": recipe.optim.name == "cpu_adam",
        "bf16": {"enabled": precision == "bf16"},
        "fp16": {"enabled": precision == "fp16"},
    }


def teacher_settings(student: dict[str, Any], offload: str) -> dict[str, Any]:
    """The teacher's DeepSpeed configuration: ZeRO-3 whatever the student's stage, nothing kept gathered.

    With a persistence threshold above 0 the teacher would keep gathered copies of small weights and never see the
    momentum update, without an error.
    """
    zero = student.get("zero_optimization", {})
    keys = ("stage3_prefetch_bucket_size", "stage3_max_live_parameters", "memory_efficient_linear")
    shared = {key: zero[key] for key in keys if key in zero}
    return {
        "steps_per_print": 2**31,
        "train_micro_batch_size_per_gpu": 1,
        "bf16": student["bf16"],
        "fp16": student["fp16"],
        "zero_optimization": {
            **shared,
            "stage": 3,
            "stage3_param_persistence_threshold": 0,
            **({"offload_param": {"device": "cpu", "pin_memory": True}} if offload == "cpu" else {}),
        },
    }
