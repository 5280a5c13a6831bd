"""A recipe: all sections together, and what follows from several of them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ilvr_ds.config.data_sections import DataConfig
from ilvr_ds.config.sections import (
    CheckpointConfig,
    DeepSpeedConfig,
    EvaluationConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    SelectionConfig,
    TeacherConfig,
    TrackingConfig,
    TrainConfig,
)


@dataclass(frozen=True)
class Recipe:
    """All settings of a run; the sections' classes document each key."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)

    @property
    def packs(self) -> bool:
        """Whether samples lie end to end in one row; a rollout with gradients has rows of its own."""
        return self.data.packing and not self.train.has_whole_chain

    @property
    def has_targets(self) -> bool:
        """Whether features of helper images are selected as targets: always in stage 1, in stage 2 if a loss needs
        them."""
        return not self.train.has_free_latents or self.loss.align_weight > 0 or self.loss.contrastive_weight > 0

    @property
    def has_teacher(self) -> bool:
        """Whether a teacher takes part in selecting them."""
        return self.has_targets and self.selection.needs_query

    @property
    def run_dir(self) -> Path:
        """Folder of this run."""
        return Path(self.run.output_dir).absolute() / self.run.name

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Sections, keys and plain values (tuples as lists), ready for JSON or YAML."""
        plain = dataclasses.asdict(self)
        return {s: {k: list(v) if isinstance(v, tuple) else v for k, v in keys.items()} for s, keys in plain.items()}

    def flat(self) -> dict[str, Any]:
        """Dotted keys and values, as in `--set`."""
        return {f"{section}.{key}": value for section, keys in self.to_dict().items() for key, value in keys.items()}
