"""What a run takes of each data set of its mixture: a pure function of the plan and the number of steps."""

from __future__ import annotations

from collections.abc import Iterator

from ilvr_ds.data.mixture_plan import Plan
from ilvr_ds.errors import counted
from ilvr_ds.tracking.names import metric_name


def seen_by_set(plan: Plan, names: tuple[str, ...], steps: int) -> dict[str, float]:
    """Samples of each set in the first `steps` steps and passes over it, as metrics; none without a mixture."""
    metrics = {}
    for name, taken, size in zip(names, plan.taken(steps), plan.set_sizes, strict=False):
        metrics[metric_name("data/samples_by_set", name)] = float(taken)
        metrics[metric_name("data/epochs_by_set", name)] = taken / size
    return metrics


def share_lines(plan: Plan, names: tuple[str, ...], steps: int) -> Iterator[str]:
    """A line for each set on what `steps` steps take of it and what they never do; none without a mixture."""
    total = steps * plan.global_batch
    for name, taken, size in zip(names, plan.taken(steps), plan.set_sizes, strict=False):
        share = f" ({taken / total:.1%} of the run)" if total else ""
        passes = f"{taken / size:.3g} passes over its {size}"
        unseen = f"; {size - taken} are never seen" if taken < size else ""
        yield f"{name}: {counted(taken, 'sample')} in {counted(steps, 'step')}{share}, {passes}{unseen}"
