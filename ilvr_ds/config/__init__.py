"""The recipe: every setting of a run, typed, documented and checked.

A recipe is a YAML file with the sections of `sections.py` and `data_sections.py`; `--set section.key=value` overrides
single values.
An unknown key, a wrong type or a value out of range is a `UserError` that names file, line and key.
ZeRO, offload and communication stand in the DeepSpeed JSON that `deepspeed.config` names, and only there.
"""

from ilvr_ds.config.data_sections import REQUIRED, DataConfig, DataSetConfig
from ilvr_ds.config.limits import LIMITS
from ilvr_ds.config.reading import load_recipe, recipe_from_dict
from ilvr_ds.config.recipe import Recipe
from ilvr_ds.config.sections import (
    CheckpointConfig,
    Compare,
    DeepSpeedConfig,
    EvaluationConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    Pool,
    RunConfig,
    SelectionConfig,
    TeacherConfig,
    TrackingConfig,
    TrainConfig,
)

__all__ = [
    "LIMITS",
    "REQUIRED",
    "CheckpointConfig",
    "Compare",
    "DataConfig",
    "DataSetConfig",
    "DeepSpeedConfig",
    "EvaluationConfig",
    "LossConfig",
    "ModelConfig",
    "OptimConfig",
    "Pool",
    "Recipe",
    "RunConfig",
    "SelectionConfig",
    "TeacherConfig",
    "TrackingConfig",
    "TrainConfig",
    "load_recipe",
    "recipe_from_dict",
]
