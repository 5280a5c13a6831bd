"""Windows in their planned order: what one rank trains on, from any step, with worker processes.

The position is one number, the optimizer step. Everything else follows from the plan, so resuming costs nothing.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from ilvr_ds.data.collate import Collator
from ilvr_ds.data.plan import SamplePlan
from ilvr_ds.data.reader import ShardReader
from ilvr_ds.data.sample import SampleError
from ilvr_ds.data.template import EncodedSample, SampleEncoder
from ilvr_ds.data.window import Window
from ilvr_ds.errors import UserError

Numbers = NDArray[np.int64]
GRACE_S = 60
"""So long a worker lives on after it was told to end."""


@dataclass
class BadSample:
    """Why a window could not be made: a worker returns it, because an exception would arrive with a traceback."""

    message: str


@dataclass
class WindowDataset(Dataset["Window | BadSample"]):
    """Item `step` is this rank's window of that optimizer step. Picklable; no random numbers."""

    reader: ShardReader
    encoder: SampleEncoder
    collator: Collator
    numbers_of: Callable[[int], Numbers]
    """Sample numbers of this rank for a step."""

    def __getitem__(self, step: int) -> Window | BadSample:
        """Read, decode, encode, collate."""
        try:
            return self.window(self.numbers_of(step))
        except UserError as error:
            return BadSample(str(error))

    def window(self, numbers: Numbers) -> Window:
        """The window of given sample numbers; raises UserError with number and id of a sample that does not fit."""
        return self.collator([self._encode(int(number)) for number in numbers], numbers)

    def _encode(self, number: int) -> EncodedSample:
        sample = self.reader.read(number)
        try:
            if not sample.steps:
                raise SampleError("it has no reasoning steps to learn from")
            return self.encoder(sample)
        except SampleError as error:
            where = f"sample {number} ('{sample.id}') of {self.reader.location}"
            raise UserError(
                f"{where}: {error}; pack the data again with this recipe (ilvr-ds pack --config)"
            ) from error


@dataclass
class PlannedNumbers:
    """The plan's share of one rank."""

    plan: SamplePlan
    rank: int
    world: int

    def __call__(self, step: int) -> Numbers:
        """Sample numbers of optimizer step `step`."""
        return self.plan.samples(step, self.rank, self.world)


@dataclass
class SequentialNumbers:
    """Samples in stored order, `batch` for each rank and step: for evaluation."""

    batch: int
    rank: int
    world: int

    def __call__(self, step: int) -> Numbers:
        """Sample numbers of evaluation step `step`."""
        start = (step * self.world + self.rank) * self.batch
        return np.arange(start, start + self.batch)


def iterate_windows(
    dataset: WindowDataset, steps: Sequence[int], num_workers: int, pin_memory: bool
) -> Iterator[Window]:
    """Windows of `steps` in order, made by worker processes; raises UserError for a sample that does not fit."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # workers are forked after the tokenizer was used
    loader: DataLoader[Window | BadSample] = DataLoader(
        dataset,
        batch_size=None,
        sampler=steps,  # type: ignore[arg-type]
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=_outlive_signals,
        generator=torch.Generator(),  # workers get a seed: it must not come from the run's own random numbers
    )
    for window in loader:
        if isinstance(window, BadSample):
            raise UserError(window.message)
        yield window


def _outlive_signals(_: int) -> None:
    """Schedulers signal every process of a job: a worker stays while the trainer ends its step and saves."""
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE_S))


class WindowLoader:
    """Iterates over (step, window) from `state_dict()["step"]` up to `last_step`."""

    def __init__(
        self, dataset: WindowDataset, plan: SamplePlan, identity: dict[str, Any], num_workers: int, pin_memory: bool
    ) -> None:
        self.dataset = dataset
        self.steps_per_epoch = plan.steps_per_epoch
        self.identity = identity
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.step = 0

    def windows(self, last_step: int) -> Iterator[tuple[int, Window]]:
        """Windows of the steps from the current one up to, not including, `last_step`.

        A window counts as consumed when the next one is asked for: `state_dict` before that names it again.
        """
        for window in iterate_windows(self.dataset, range(self.step, last_step), self.num_workers, self.pin_memory):
            yield self.step, window
            self.step += 1

    def state_dict(self) -> dict[str, Any]:
        """The next step, and what the order depends on."""
        return {"step": self.step, **self.identity}

    def check(self, state: dict[str, Any]) -> None:
        """Raise UserError where the data or the settings of its order were others when `state` was saved."""
        for key, value in self.identity.items():
            if state.get(key) != value:
                raise UserError(f"the checkpoint was made with {key} = {state.get(key)}, this run has {value}")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at `state["step"]`; raises UserError like `check`."""
        self.check(state)
        self.step = int(state["step"])
