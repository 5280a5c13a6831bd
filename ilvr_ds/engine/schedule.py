"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from ilvr_ds.config import OptimConfig


def learning_rate(settings: OptimConfig, step: int, total_steps: int) -> float:
    """Rate of optimizer step `step` (0 is the first) of `total_steps`: linear warm-up, then the schedule."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    span = max(1, total_steps - settings.warmup_steps)
    progress = min(1.0, (step - settings.warmup_steps) / span)
    if settings.schedule == "constant":
        return settings.lr
    fall = progress if settings.schedule == "linear" else (1 - math.cos(math.pi * progress)) / 2
    return settings.lr * (1 - (1 - settings.min_lr_ratio) * fall)
