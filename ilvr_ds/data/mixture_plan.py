"""Which samples of a mixture belong to which optimizer step: a pure function of (seed, step).

    1. Of each data set the samples are an endless sequence: one order of the whole set after the other. In each the
       shards stand in an order drawn for it, and are shuffled `lanes` x `shuffle_buffer` samples at a time.
    2. After t samples of the mixture each set has given its share of t, to within a few samples. Step k takes from each
       set what is new between k x global_batch and (k + 1) x global_batch.
    3. The samples of a step are shuffled and dealt to the lanes.

A rank takes lanes rank, rank + world, ...: a step has the same samples at every world size, and a run goes on at any
step without replaying earlier ones. An epoch cuts nothing off: the sequences go on in the next one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from typing import TypeAlias

import numpy as np

from ilvr_ds.config import DataSetConfig, Recipe
from ilvr_ds.data.mixture import Mixture
from ilvr_ds.data.plan import Int64, SamplePlan, check_lanes, check_world, in_shard_order, permutation

_SET_SHARDS, _SET_BLOCK, _STEP = 3, 4, 5  # what a permutation is for: part of its seed; plan.py has 1, 2 and 6


@dataclass(frozen=True)
class MixturePlan:
    """The order of the samples of several data sets; they are numbered through, set after set.

    shard_sizes: of each set the samples of its shards. rates: of how many samples of the mixture how many are of each
    set; only their ratios count. epoch_samples: of all sets together. Raises UserError like SamplePlan.
    """

    shard_sizes: tuple[tuple[int, ...], ...]
    rates: tuple[int, ...]
    epoch_samples: int
    seed: int
    lanes: int
    global_batch: int
    shuffle_buffer: int = 4096

    def __post_init__(self) -> None:
        if min(self.lanes, self.global_batch, self.shuffle_buffer, *self.rates) < 1 or self.seed < 0:
            raise ValueError(f"lanes, batch, buffer and rates must be positive and the seed not negative: {self.rates}")
        check_lanes(self.lanes, self.global_batch, self.epoch_samples)

    @cached_property
    def set_sizes(self) -> tuple[int, ...]:
        """Samples of each set."""
        return tuple(map(sum, self.shard_sizes))

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch."""
        return self.epoch_samples // self.global_batch

    @property
    def remainder(self) -> int:
        """Samples by which an epoch is more than its steps; they come in the next one."""
        return self.epoch_samples % self.global_batch

    def check_world(self, world: int) -> None:
        """Raise UserError where `world` ranks cannot share the lanes equally."""
        check_world(self.lanes, self.global_batch, world)

    def taken(self, steps: int) -> tuple[int, ...]:
        """Samples of each set in the first `steps` steps, repeated ones included."""
        return divided(steps * self.global_batch, self.rates)

    def samples(self, step: int, rank: int, world: int) -> Int64:
        """[global_batch / world]: sample numbers of this rank's share of step `step`.

        The rank's lanes in ascending order. Raises UserError like check_world.
        """
        self.check_world(world)
        first = np.cumsum((0, *self.set_sizes))
        numbers = np.concatenate(
            [
                first[number] + self._sequence(number, start, stop)
                for number, (start, stop) in enumerate(zip(self.taken(step), self.taken(step + 1), strict=True))
            ]
        )
        dealt = numbers[permutation(self.global_batch, (self.seed, step, _STEP))]
        return dealt.reshape(self.lanes, -1)[rank::world].reshape(-1)

    def _sequence(self, number: int, start: int, stop: int) -> Int64:
        """[stop - start]: entries start to stop of the endless sequence of set `number`, as numbers in the set."""
        size = self.set_sizes[number]
        parts = [np.empty(0, dtype=np.int64)]
        while start < stop:
            passed, place = divmod(start, size)
            end = min(size, place + stop - start)
            parts.append(self._of_pass(number, passed, np.arange(place, end)))
            start += end - place
        return np.concatenate(parts)

    def _of_pass(self, number: int, passed: int, wanted: Int64) -> Int64:
        """Entries `wanted` (ascending) of the order of set `number` that follows after `passed` others."""
        block_size = self.lanes * self.shuffle_buffer
        blocks = wanted // block_size
        positions = []
        for block in range(int(blocks[0]), int(blocks[-1]) + 1):
            start = block * block_size
            length = min(block_size, self.set_sizes[number] - start)
            order = _block_order(length, (self.seed, passed, _SET_BLOCK, number, block))
            positions.append(start + order[wanted[blocks == block] - start])
        key = (self.seed, passed, _SET_SHARDS, number)
        return in_shard_order(np.concatenate(positions), self.shard_sizes[number], key)


Plan: TypeAlias = SamplePlan | MixturePlan


def build_plan(recipe: Recipe, mixture: Mixture, world: int) -> Plan:
    """The order of the samples of a job of `world` ranks. Raises UserError."""
    data, seed = recipe.data, recipe.run.seed
    batch = recipe.train.micro_batch_size * recipe.train.grad_accum_steps * world
    sizes = tuple(shards.shard_sizes for shards in mixture.sets)
    plan: Plan
    if data.is_mixture:
        rates, epoch_samples = rates_of(data.sets, tuple(map(sum, sizes)))
        plan = MixturePlan(sizes, rates, epoch_samples, seed, data.lanes, batch, data.shuffle_buffer)
    else:
        plan = SamplePlan(sizes[0], seed, data.lanes, batch, data.shuffle_buffer)
    plan.check_world(world)
    return plan


def rates_of(entries: Sequence[DataSetConfig], set_sizes: Sequence[int]) -> tuple[tuple[int, ...], int]:
    """The rates of a mixture's sets and the samples of its epoch, from weights or from epochs of each set.

    With weights an epoch has as many samples as all sets together. Numbers count as they are written: 0.1 is a tenth.
    """
    if entries[0].weight is not None:
        exact = [Fraction(repr(entry.weight)) for entry in entries]
        epoch_samples = sum(set_sizes)
    else:
        exact = [Fraction(repr(entry.epochs)) * size for entry, size in zip(entries, set_sizes, strict=True)]
        epoch_samples = math.floor(sum(exact))
    scale = math.lcm(*(share.denominator for share in exact))
    whole = [int(share * scale) for share in exact]
    common = math.gcd(*whole)
    return tuple(rate // common for rate in whole), epoch_samples


def divided(total: int, rates: tuple[int, ...]) -> tuple[int, ...]:
    """How many of the first `total` samples are of each set: Webster's method of dividing seats by votes.

    Unlike rounded shares it takes nothing back: no number falls as the total grows. In exact integers.
    """
    whole = sum(rates)
    counts = [(2 * total * rate + whole) // (2 * whole) for rate in rates]
    sets = range(len(rates))
    while (missing := total - sum(counts)) > 0:
        counts[min(sets, key=lambda i: (Fraction(2 * counts[i] + 1, rates[i]), i))] += 1
    while missing < 0:
        counts[max(sets, key=lambda i: (Fraction(2 * counts[i] - 1, rates[i]), i))] -= 1
        missing += 1
    return tuple(counts)


@lru_cache(maxsize=32)
def _block_order(length: int, key: tuple[int, ...]) -> Int64:
    return permutation(length, key)
