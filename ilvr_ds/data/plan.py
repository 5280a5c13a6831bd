"""Which samples belong to which optimizer step: a pure function of (seed, epoch, step).

    1. The shards, in an order drawn for the epoch, are one ring of samples. Where whole steps do not take all of them,
       the epoch begins at a drawn place and leaves out the remainder before it, so that no sample is always left out.
    2. The sequence is cut into `lanes` of equal length; each is shuffled `shuffle_buffer` samples at a time.
    3. Step k of the epoch takes the k-th stretch of global_batch / lanes samples of every lane.

A rank reads lanes rank, rank + world, ...: a step has the same samples at every world size, and a run goes on at any
step without replaying earlier ones. Random numbers are raw words of PCG64, whose stream numpy guarantees; its
`permutation` may change between releases.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from ilvr_ds.errors import UserError

Int64 = NDArray[np.int64]

_GLOBAL_BATCH = "the global batch (train.micro_batch_size x train.grad_accum_steps x ranks)"
_SHARDS, _BUFFER, _START = 1, 2, 6  # what is drawn: part of its seed; mixture_plan.py has 3 to 5


@dataclass(frozen=True)
class SamplePlan:
    """The order of the samples of a data set whose shards hold `shard_sizes` samples.

    `global_batch` is the number of samples of an optimizer step on all ranks. Raises UserError where `lanes` does not
    divide it, or where the data set does not fill one step.
    """

    shard_sizes: tuple[int, ...]
    seed: int
    lanes: int
    global_batch: int
    shuffle_buffer: int = 4096

    def __post_init__(self) -> None:
        if min(self.lanes, self.global_batch, self.shuffle_buffer) < 1 or self.seed < 0:
            raise ValueError(f"lanes, global batch and buffer must be positive and the seed not negative: {self}")
        check_lanes(self.lanes, self.global_batch, self.num_samples)

    @cached_property
    def num_samples(self) -> int:
        """Samples of the data set."""
        return sum(self.shard_sizes)

    @property
    def set_sizes(self) -> tuple[int, ...]:
        """Samples of each data set: here of the only one."""
        return (self.num_samples,)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch."""
        return self.num_samples // self.global_batch

    @property
    def remainder(self) -> int:
        """Samples that an epoch leaves out; each epoch leaves out others."""
        return self.num_samples % self.global_batch

    def check_world(self, world: int) -> None:
        """Raise UserError where `world` ranks cannot share the lanes equally."""
        check_world(self.lanes, self.global_batch, world)

    def taken(self, steps: int) -> tuple[int, ...]:
        """Samples of the first `steps` steps, of each data set: here of the only one."""
        return (steps * self.global_batch,)

    def samples(self, step: int, rank: int, world: int) -> Int64:
        """[global_batch / world]: sample numbers of this rank's share of global step `step`; epochs follow each other.

        The rank's lanes in ascending order, each with its global_batch / lanes samples. Raises UserError like
        check_world.
        """
        self.check_world(world)
        epoch, step = divmod(step, self.steps_per_epoch)
        share = self.global_batch // self.lanes
        lane_length = self.steps_per_epoch * share
        lanes = range(rank, self.lanes, world)
        wanted = np.arange(step * share, (step + 1) * share)
        positions = np.concatenate([lane * lane_length + self._shuffled(epoch, lane, wanted) for lane in lanes])
        positions = (positions + self._start(epoch)) % self.num_samples
        return in_shard_order(positions, self.shard_sizes, (self.seed, epoch, _SHARDS))

    def _start(self, epoch: int) -> int:
        """Where the epoch begins in the ring: at its beginning where nothing is left out."""
        return int(_random_words(1, (self.seed, epoch, _START))[0]) % self.num_samples if self.remainder else 0

    def _shuffled(self, epoch: int, lane: int, wanted: Int64) -> Int64:
        """Positions in a lane of its entries `wanted` (ascending) once each buffer is shuffled."""
        lane_length = self.steps_per_epoch * (self.global_batch // self.lanes)
        buffers = wanted // self.shuffle_buffer
        parts = []
        for buffer in range(int(buffers[0]), int(buffers[-1]) + 1):
            start = buffer * self.shuffle_buffer
            length = min(self.shuffle_buffer, lane_length - start)
            order = _buffer_order(length, (self.seed, epoch, _BUFFER, lane, buffer))
            parts.append(start + order[wanted[buffers == buffer] - start])
        return np.concatenate(parts)


def check_lanes(lanes: int, global_batch: int, epoch_samples: int) -> None:
    """Raise UserError where `lanes` does not divide the global batch, or an epoch does not fill one step."""
    if global_batch % lanes:
        fitting = _nearest(lanes, _divisors(global_batch))
        raise UserError(
            f"data.lanes: {lanes} does not divide {_GLOBAL_BATCH} of {global_batch}; nearest valid data.lanes: "
            f"{fitting}; nearest valid batch: {_multiples(global_batch, lanes)}"
        )
    if epoch_samples < global_batch:
        raise UserError(f"data.shards: {epoch_samples} samples do not fill {_GLOBAL_BATCH} of {global_batch} samples")


def check_world(lanes: int, global_batch: int, world: int) -> None:
    """Raise UserError where `world` ranks cannot share the lanes equally."""
    if lanes % world == 0:
        return
    fitting = [n for n in _divisors(global_batch) if n % world == 0]
    valid = (
        _nearest(lanes, fitting)
        if fitting
        else (f"none, because {world} does not divide {_GLOBAL_BATCH} of {global_batch} either")
    )
    raise UserError(
        f"data.lanes: {lanes} lanes cannot be shared by {world} ranks; nearest valid data.lanes: {valid}; "
        f"nearest valid number of ranks: {_nearest(world, _divisors(lanes))}"
    )


def in_shard_order(positions: Int64, shard_sizes: tuple[int, ...], key: tuple[int, ...]) -> Int64:
    """Sample numbers at `positions` of a data set whose shards are put in the order that `key` draws."""
    first_samples, ends = _shard_order(shard_sizes, key)
    shard = np.searchsorted(ends, positions, side="right")
    # A sample's distance from the end of its shard is the same in the sequence and in the data set.
    result: Int64 = first_samples[shard] + positions
    return result


@lru_cache(maxsize=64)
def _shard_order(shard_sizes: tuple[int, ...], key: tuple[int, ...]) -> tuple[Int64, Int64]:
    """For each shard in the drawn order: what to add to a position to get its sample, and where the shard ends."""
    sizes = np.asarray(shard_sizes, dtype=np.int64)
    order = permutation(len(sizes), key)
    ends = np.cumsum(sizes[order])
    return np.cumsum(sizes)[order] - ends, ends


@lru_cache(maxsize=1024)
def _buffer_order(length: int, key: tuple[int, ...]) -> Int64:
    return permutation(length, key)


def permutation(length: int, key: tuple[int, ...]) -> Int64:
    """A random order of 0 .. length-1 that depends on `key` alone."""
    return np.argsort(_random_words(length, key), kind="stable").astype(np.int64)


def _random_words(length: int, key: tuple[int, ...]) -> NDArray[np.uint64]:
    """[length]: 64 random bits each, which depend on `key` alone."""
    words: NDArray[np.uint64] = np.random.PCG64(np.random.SeedSequence(key)).random_raw(length)
    return words


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _multiples(number: int, of: int) -> str:
    """The nearest multiples of `of` below and above `number`."""
    below = number // of * of
    return " or ".join(str(n) for n in (below, below + of) if n)


def _nearest(number: int, valid: Iterable[int]) -> str:
    """The nearest valid numbers below and above."""
    options = sorted(valid)
    below = [n for n in options if n <= number][-1:]
    above = [n for n in options if n >= number][:1]
    return " or ".join(str(n) for n in dict.fromkeys(below + above))
