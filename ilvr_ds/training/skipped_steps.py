"""Optimizer steps that were skipped because their gradients were not finite; too many in a row end the run."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch import Tensor

from ilvr_ds import dist
from ilvr_ds.data.window import Window
from ilvr_ds.errors import RunError
from ilvr_ds.tracking.tracker import Tracker
from ilvr_ds.training.saving import Saver

logger = logging.getLogger("ilvr_ds")


class SkippedSteps:
    """Counts skipped steps in a row, the same on all ranks. most: `train.max_skipped_steps`."""

    def __init__(self, tracker: Tracker, saver: Saver, most: int) -> None:
        self.tracker = tracker
        self.saver = saver
        self.most = most
        self.in_a_row = 0

    def add(self, step: int, window: Window, losses: Sequence[Tensor]) -> None:
        """Count and record a step that changed nothing; losses: of its micro-batches (collective).

        Waits for the device, which a skipped step may. Raises RunError, on all ranks, where it is one too many.
        """
        self.in_a_row += 1
        bad = [micro.ids for micro, loss in zip(window.micro_batches, losses, strict=True) if not loss.isfinite()]
        for ids in bad:
            logger.warning("step %d: the loss is not finite; samples %s", step + 1, ", ".join(ids))
        dist.warn("step %d: the gradients are not finite; the step is skipped", step + 1)
        self.tracker.event("skipped_step", step=step + 1)
        if self.in_a_row >= self.most:
            self.saver.finish()
            named = sorted({name for ranks in dist.gather_on_host(bad) for ids in ranks for name in ids})
            where = f"; losses that are not finite: samples {', '.join(named)}" if named else ""
            raise RunError(
                f"step {step + 1}: the gradients were not finite in {self.in_a_row} steps in a row "
                f"(train.max_skipped_steps){where}; go on from the last checkpoint with a lower optim.lr"
            )
