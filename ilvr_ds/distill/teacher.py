"""The momentum teacher: reads windows for the queries of a selection, and is updated after the student's step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from ilvr_ds.data.window import Window
from ilvr_ds.distill.ema import MomentumShards
from ilvr_ds.distill.query import Context


class MomentumTeacher:
    """Holds the teacher's network, its float32 shards, and a way to read the student's shards.

    `network` is a ContextEncoder or an engine around one. `student_shards` yields this rank's float32 shards of the
    student in the order of `shards`; it may be collective. The network reads `micro_batches_at_once` together.
    """

    def __init__(
        self,
        network: Callable[..., Context],
        shards: MomentumShards,
        student_shards: Callable[[], Iterator[Tensor]],
        micro_batches_at_once: int,
    ) -> None:
        self.network = network
        self.shards = shards
        self.student_shards = student_shards
        self.micro_batches_at_once = micro_batches_at_once
        self._since: torch.cuda.Event | None = None
        self._is_stale = False

    @torch.no_grad()
    def read(self, window: Window, features: Tensor) -> Context:
        """The parts of the queries of the whole window; the teacher does not change inside it.

        features [F, D or more]: image features of the window.
        """
        self.update()
        return self.network(window.tokens, features, window.context, self._pieces(window))

    def _pieces(self, window: Window) -> list[range]:
        """Samples to read together. All ranks have equally many micro-batches, so equally many pieces."""
        ends = list(accumulate((len(micro.ids) for micro in window.micro_batches), initial=0))
        cuts = [*ends[: -1 : self.micro_batches_at_once], ends[-1]]
        return [range(first, last) for first, last in pairwise(cuts)]

    def mark_stale(self) -> None:
        """Say that the student has moved. The update comes when the teacher is needed next: by then the next batch has
        been copied, and the device has other work beside it."""
        self.update()
        self._is_stale = True
        if self.shards.device.type == "cuda":
            self._since = torch.cuda.current_stream(self.shards.device).record_event()

    def update(self) -> None:
        """The momentum (EMA) update, where the student has moved since the last; the host waits for it. Collective."""
        if self._is_stale:
            self.shards.update(self.student_shards(), self._since)
            self.shards.wait()
        self._is_stale = False

    def take_drift(self) -> Tensor:
        """[2]: the sums of MomentumShards.take_drift. Collective."""
        self.update()
        return self.shards.take_drift()

    def state(self) -> list[Tensor]:
        """The averages, as MomentumShards.state gives them. Collective."""
        self.update()
        return self.shards.state()
