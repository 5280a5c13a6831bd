"""Steps with a teacher and without one, on every rank."""

from __future__ import annotations

from typing import Any

from ilvr_ds import dist
from ilvr_ds.config import SelectionConfig, TrainConfig
from tests.distributed.workers import ALL_LOSSES, all_weights
from tests.golden_set import golden_set
from tests.runs import SmallRun, golden_recipe


def with_and_without_teacher(stage: int, zero: dict[str, Any], steps: int) -> list[dict[str, Any]]:
    """Losses and weights of steps in which the most changed patches are targets: with a teacher, and without one."""
    golden = golden_set()
    results = []
    for unchanged in ("query", "none"):
        selection = SelectionConfig(pool="changed", by="change", unchanged=unchanged, temperature=0.1)
        train = TrainConfig(stage=stage, precision="fp32", micro_batch_size=2, grad_accum_steps=2)
        run = SmallRun.start(golden_recipe(golden, selection=selection, train=train, loss=ALL_LOSSES), zero)
        windows = [run.window([step + dist.rank() + i for i in range(4)]) for step in range(steps)]
        losses = [run.train(window, step) for step, window in enumerate(windows)]
        sums = run.totals.take()
        has_teacher = run.networks.teacher is not None and run.step.teacher is not None
        results.append({"losses": losses, "sums": sums, "weights": all_weights(run), "has_teacher": has_teacher})
    return results
