"""What a run is made of; assembly/ makes it, the trainer uses it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ilvr_ds.checkpoint.writer import CheckpointWriter
from ilvr_ds.config import Recipe
from ilvr_ds.data.loader import WindowLoader
from ilvr_ds.engine.networks import Networks
from ilvr_ds.monitoring.throughput import Throughput
from ilvr_ds.monitoring.watchdog import Watchdog
from ilvr_ds.tracking.tracker import Tracker
from ilvr_ds.training.best import Best
from ilvr_ds.training.held_out import HeldOut
from ilvr_ds.training.pictures import Pictures
from ilvr_ds.training.quarantines import Quarantines
from ilvr_ds.training.step import TrainingStep


@dataclass
class Components:
    """The parts of a run, ready to be used."""

    recipe: Recipe
    loader: WindowLoader
    step: TrainingStep
    networks: Networks
    """Those of `step`"""
    held_out: HeldOut | None
    tracker: Tracker
    pictures: Pictures
    writer: CheckpointWriter
    watchdog: Watchdog
    speed: Throughput
    quarantine: Quarantines
    """Training samples that could not be used"""
    total_steps: int
    rehearsal: list[NDArray[np.int64]] | None
    """The longest training samples as the micro-batches of a step, where their lengths are known"""
    checkpoint: Path | None = None
    """The run goes on from its state."""
    is_resharded: bool = False
    """The checkpoint was saved by another number of ranks, or under another ZeRO stage."""
    best: Best = field(default_factory=Best)
    """The best evaluation so far"""
    base: dict[str, Any] = field(default_factory=dict)
    """For checkpoints: which frozen weights, that no checkpoint holds, the trained ones stand on"""
