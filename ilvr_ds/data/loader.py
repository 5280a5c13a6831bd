"""Windows in their planned order: what one rank trains on, from any step, with worker processes.

The position is one number, the optimizer step. Everything else follows from the plan, so resuming costs nothing.
A sample that cannot be read or encoded is replaced by a stand-in and named in its window; see training/quarantine.py.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from ilvr_ds.data.collate import Collator
from ilvr_ds.data.features import FeatureSet
from ilvr_ds.data.mixture import MixtureFeatures, MixtureReader
from ilvr_ds.data.mixture_plan import Plan
from ilvr_ds.data.parcel import Parcel, allow_open_files
from ilvr_ds.data.reader import ShardReader
from ilvr_ds.data.sample import SampleError
from ilvr_ds.data.template import EncodedSample, SampleEncoder
from ilvr_ds.data.window import BadSample, Window
from ilvr_ds.errors import UserError

Numbers = NDArray[np.int64]
ALIVE_S = 5.0
"""Seconds between two looks of a worker at whether its trainer is alive."""


@dataclass
class WindowDataset(Dataset[Window]):
    """Item `step` is this rank's window of that optimizer step. Picklable; draws no random numbers."""

    reader: ShardReader | MixtureReader
    encoder: SampleEncoder
    collator: Collator
    numbers_of: Callable[[int], Sequence[Numbers]]
    """Sample numbers of this rank's micro-batches of a step."""
    features: FeatureSet | MixtureFeatures | None = None
    """Stored features, read instead of pixels, which the encoder then leaves out."""

    def __getitem__(self, step: int) -> Window:
        """Read, decode, encode, collate."""
        return self.window(self.numbers_of(step))

    def window(self, micro_batches: Sequence[Numbers]) -> Window:
        """The window of given sample numbers, with stand-ins for bad samples."""
        before = self._retries
        bad: list[BadSample] = []
        numbers = np.concatenate(micro_batches)
        samples = [self._encode(int(number), bad) for number in numbers]
        window = self.collator(samples, numbers, [len(micro) for micro in micro_batches])
        return replace(window, bad=tuple(bad), retries=self._retries - before)

    @property
    def _retries(self) -> int:
        return self.reader.retries + (self.features.retries if self.features else 0)

    def _encode(self, number: int, bad: list[BadSample]) -> EncodedSample:
        """The sample, or a stand-in that is then added to `bad`."""
        name = ""
        try:
            sample = self.reader.read(number)
            name = sample.id
            if not sample.steps:
                raise SampleError("it has no reasoning steps to learn from")
            encoded = self.encoder(sample)
            return self._with_features(encoded, number) if self.features else encoded
        except (UserError, SampleError) as error:
            bad.append(BadSample(number, name, *self.reader.place(number), str(error)))
            stand_in = self.encoder.stand_in(name or f"sample {number}")
            return replace(stand_in, features=self.features.empty()) if self.features else stand_in

    def _with_features(self, sample: EncodedSample, number: int) -> EncodedSample:
        assert self.features is not None
        merged = [height * width // self.encoder.merge_size**2 for height, width in sample.grids]
        inputs, helpers = sum(merged[: sample.num_input_images]), sum(merged[sample.num_input_images :])
        return replace(sample, features=self.features.read(number, inputs, helpers))


@dataclass
class PlannedNumbers:
    """The plan's share of one rank, `micro_batch_size` samples at a time."""

    plan: Plan
    rank: int
    world: int
    micro_batch_size: int

    def __call__(self, step: int) -> list[Numbers]:
        """Sample numbers of the micro-batches of optimizer step `step`."""
        mine = self.plan.samples(step, self.rank, self.world)
        return np.split(mine, range(self.micro_batch_size, len(mine), self.micro_batch_size))


@dataclass
class SequentialNumbers:
    """Samples in stored order, `batch` for each rank and step: for evaluation."""

    batch: int
    rank: int
    world: int

    def __call__(self, step: int) -> list[Numbers]:
        """Sample numbers of evaluation step `step`: one micro-batch."""
        start = (step * self.world + self.rank) * self.batch
        return [np.arange(start, start + self.batch)]


@dataclass
class SetAfterSet:
    """At most `most` samples of each set of a mixture, evenly from all of it and in stored order, one set after the
    other: for evaluation. Data may be sorted by kind, so the first samples of a set would stand for the first kinds.

    starts [sets]: number of each set's first sample; sizes [sets]: samples of each; steps [sets]: how many steps each
    set has. Where `most` is as large as a set, its samples are numbered as `of_set` does.
    """

    of_set: SequentialNumbers
    starts: Sequence[int]
    sizes: Sequence[int]
    steps: Sequence[int]
    most: int

    def __call__(self, step: int) -> list[Numbers]:
        """Sample numbers of evaluation step `step`: one micro-batch, of one set."""
        for start, size, steps in zip(self.starts, self.sizes, self.steps, strict=True):
            if step < steps:
                # not of those that whole steps take: they depend on the number of ranks
                return [start + numbers * size // min(self.most, size) for numbers in self.of_set(step)]
            step -= steps
        raise IndexError(f"no step {step} behind the last set")


def iterate_windows(
    dataset: WindowDataset, steps: Sequence[int], num_workers: int, pin_memory: bool
) -> Iterator[Window]:
    """Windows of `steps` in order, made by worker processes."""
    allow_open_files()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # workers are forked after the tokenizer was used
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_size=None,
        collate_fn=Parcel.of,  # type: ignore[arg-type]  # without a batch size: of one window
        sampler=steps,  # type: ignore[arg-type]
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=_outlive_signals,
        generator=torch.Generator(),  # workers get a seed: it must not come from the run's own random numbers
    )
    for parcel in loader:
        yield parcel.open()


def _outlive_signals(_: int) -> None:
    """Make a worker ignore signals, and end, however busy, when its trainer says so or is gone.

    Schedulers signal every process of a job, and a trainer may need its workers long after that: for a last step, an
    evaluation, a checkpoint.
    """
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # the new thread inherits this, and waits for it
    threading.Thread(target=_end_with_trainer, args=(os.getppid(),), name="trainer's end", daemon=True).start()


def _end_with_trainer(trainer: int) -> None:
    while os.getppid() == trainer:
        told = signal.sigtimedwait({signal.SIGTERM}, ALIVE_S)
        if told is not None and told.si_pid == trainer:
            break
    os._exit(128 + signal.SIGTERM)


class WindowLoader:
    """Iterates over (step, window) from `state_dict()["step"]` up to `last_step`."""

    def __init__(
        self,
        dataset: WindowDataset,
        plan: Plan,
        identity: dict[str, Any],
        num_workers: int,
        pin_memory: bool,
        notes: dict[str, Any] | None = None,
    ) -> None:
        self.dataset = dataset
        self.plan = plan
        self.identity = identity
        self.notes = notes or {}
        """Saved beside the identity, and not compared."""
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.step = 0

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch."""
        return self.plan.steps_per_epoch

    def samples_of(self, step: int) -> tuple[int, ...]:
        """Samples of each data set in optimizer step `step`, on all ranks."""
        before, after = self.plan.taken(step), self.plan.taken(step + 1)
        return tuple(new - old for old, new in zip(before, after, strict=True))

    def windows(self, last_step: int) -> Iterator[tuple[int, Window]]:
        """Windows of the steps from the current one up to, not including, `last_step`.

        A window counts as consumed when the next one is asked for: `state_dict` before that names it again.
        """
        for window in iterate_windows(self.dataset, range(self.step, last_step), self.num_workers, self.pin_memory):
            yield self.step, window
            self.step += 1

    def state_dict(self) -> dict[str, Any]:
        """The next step, and the settings that the order depends on."""
        return {"step": self.step, **self.identity, **self.notes}

    def check(self, state: dict[str, Any]) -> None:
        """Raise UserError where `state` was saved with other data or another order."""
        for key, value in self.identity.items():
            if state.get(key) != value:
                raise UserError(f"the checkpoint was made with {key} = {state.get(key)}, this run has {value}")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at `state["step"]`; raises UserError like `check`."""
        self.check(state)
        self.step = int(state["step"])
