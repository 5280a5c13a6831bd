"""The teacher's weights are an exponential moving average (EMA) of the student's, in float32, shard by shard.

Every rank holds the same slice of both networks, so the update needs no communication. In bf16 it would stand still:
1e-3 of a small difference is below half a unit in the last place.

What the teacher's network reads in bf16 is the upper half of the average's bits, so that of the average only the lower
half is kept beside it: two bytes a weight in host memory, and two less to move in each update.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from ilvr_ds.ops.ema import ema_update, join, split, squares

PIECE = 2**24
"""Elements moved at a time: 64 MiB of float32, a power of two because pinned memory comes in those."""
STREAMS = 6
"""Streams that pieces go to in turn: while one computes, others copy in both directions."""


class _Piece:
    """A run of elements of one shard: the weights that the teacher reads, and the float32 average.

    weights: the run of the shard, 1-dimensional. average: initial float32 values, on any device.
    """

    def __init__(self, weights: Tensor, average: Tensor, is_pinned: bool) -> None:
        self.weights = weights
        self.is_split = weights.dtype == torch.bfloat16
        dtype = torch.int16 if self.is_split else torch.float32
        self.residual = torch.empty(weights.numel(), dtype=dtype, device=weights.device, pin_memory=is_pinned)
        """The average, or the lower half of its bits where `weights` is the upper one."""
        self.set(average)

    def set(self, average: Tensor) -> None:
        """Set the average, and the weights."""
        parts = split(average) if self.is_split else (average, average)
        for here, values in zip((self.weights, self.residual), parts, strict=True):
            here.copy_(values, non_blocking=True)

    def get(self) -> Tensor:
        """The average, float32, on the device of the weights."""
        return join(self.weights, self.residual) if self.is_split else self.residual

    def update(self, student: Tensor, weight: float, sums: Tensor) -> None:
        """average += weight * (student - average) on the student's device; drift sums onto `sums` [2]."""
        if self.is_split:
            upper, lower = (half.to(student.device, non_blocking=True) for half in (self.weights, self.residual))
            ema_update(upper, lower, student, weight, sums)
            new = upper, lower
        else:
            average = self.residual.to(student.device, non_blocking=True).lerp_(student, weight)
            sums += squares(average - student, student)
            new = average, average
        for here, values in zip((self.weights, self.residual), new, strict=True):
            if here is not values:
                here.copy_(values, non_blocking=True)


class MomentumShards:
    """This rank's float32 averages, and how they reach the network that the teacher runs.

    `weights[i]` is the flat shard (1-dimensional) of parameter i that the teacher's network reads, in the network's
    dtype, in host memory or on the device; the averages lie where it lies. `device` is where the arithmetic is done:
    averages in host memory stream through it, because the host's own arithmetic takes longer than a training step.
    """

    @torch.no_grad()
    def __init__(self, weights: list[Tensor], initial: Iterable[Tensor], momentum: float, device: torch.device):
        self.weights = weights
        self.momentum = momentum
        self.device = device
        self.pieces: list[list[_Piece]] = []
        """By parameter"""
        for shard, values in zip(weights, initial, strict=True):
            is_pinned = device.type == "cuda" and shard.device.type == "cpu"
            average = values.flatten().to(device, torch.float32)
            runs = zip(torch.split(shard, PIECE), torch.split(average, PIECE), strict=True)
            self.pieces.append([_Piece(run, part, is_pinned) for run, part in runs])
        self.streams = _streams(device)
        self.sums = torch.zeros(max(1, len(self.streams)), 2, dtype=torch.float64, device=device)
        self.is_under_way = False
        self._finish_copies()

    @torch.no_grad()
    def update(self, student: Iterable[Tensor], after: torch.cuda.Event | None = None) -> None:
        """Begin: average <- momentum * average + (1 - momentum) * student, and the teacher's weights with it.

        `student` yields the float32 shards in the order of the parameters; until `wait` returns nobody may change them
        or read the teacher's weights. On a GPU copies and arithmetic run beside other work, once `after` has happened
        (by default, all that the current stream was given).
        """
        self.wait()
        if not self.streams:
            for pieces, shard in zip(self.pieces, student, strict=True):
                for piece, values in _cut(shard, pieces):
                    self._advance(piece, values, self.sums[0])
            return
        lead, *others = self.streams
        lead.wait_event(after or torch.cuda.current_stream(self.device).record_event())
        turn, alive = 0, deque[tuple[Tensor, list[torch.cuda.Event]]]()
        with torch.cuda.stream(lead):  # in which shards are gathered where they must be
            for pieces, shard in zip(self.pieces, student, strict=True):
                is_there, done = lead.record_event(), []
                for piece, values in _cut(shard, pieces):
                    stream = others[turn % STREAMS]
                    stream.wait_event(is_there)
                    with torch.cuda.stream(stream):
                        self._advance(piece, values, self.sums[turn % STREAMS])
                    done.append(stream.record_event())
                    turn += 1
                alive.append((shard, done))
                # the host runs far ahead: without a limit it would take memory for all gathered shards at once
                while len(alive) > 1 and sum(shard.numel() for shard, _ in alive) > STREAMS * PIECE:
                    for event in alive.popleft()[1]:
                        lead.wait_event(event)
            for _, done in alive:
                for event in done:
                    lead.wait_event(event)
        self.is_under_way = True

    def wait(self) -> None:
        """Block the host until the last update is done: fetches of the teacher's weights from host memory are ordered
        with no stream."""
        if self.is_under_way:
            for stream in self.streams:
                stream.synchronize()
        self.is_under_way = False

    def take_drift(self) -> Tensor:
        """[2] float64 on `device`: the sums of (average - student)^2 and student^2 over this rank's shards and the
        updates since the last call."""
        self.wait()
        sums = self.sums.sum(0)
        self.sums.zero_()
        return sums

    def _advance(self, piece: _Piece, student: Tensor, sums: Tensor) -> None:
        piece.update(student.to(self.device, torch.float32, non_blocking=True), 1 - self.momentum, sums)

    def state(self) -> list[Tensor]:
        """The averages as one flat float32 tensor per parameter, on the CPU."""
        self.wait()
        return [_whole(pieces) for pieces in self.pieces]

    @torch.no_grad()
    def load_state(self, state: list[Tensor]) -> None:
        """Restore what `state` gave. Raises ValueError where a shard has another size."""
        self.wait()
        for shard, values in zip(self.weights, state, strict=True):
            if shard.numel() != values.numel():
                raise ValueError(f"a teacher shard has {shard.numel()} elements, the stored one {values.numel()}")
        for pieces, values in zip(self.pieces, state, strict=True):
            for piece, average in _cut(values, pieces):
                piece.set(average.to(self.device, torch.float32))
        self._finish_copies()

    def _finish_copies(self) -> None:
        if self.streams:
            torch.cuda.synchronize(self.device)  # nobody else waits for copies to host memory


def _whole(pieces: list[_Piece]) -> Tensor:
    return torch.cat([piece.get().cpu() for piece in pieces]) if pieces else torch.empty(0)


def _cut(shard: Tensor, pieces: list[_Piece]) -> Iterator[tuple[_Piece, Tensor]]:
    """Each piece with its run of a shard's elements."""
    return zip(pieces, torch.split(shard.flatten(), [piece.residual.numel() for piece in pieces]), strict=True)


def _streams(device: torch.device) -> list[torch.cuda.Stream]:
    """One that leads and STREAMS that pieces go through; none without a GPU."""
    count = STREAMS + 1 if device.type == "cuda" else 0
    # of high priority: their short kernels must not queue behind the long ones of the vision tower
    return [torch.cuda.Stream(device, priority=-1) for _ in range(count)]  # type: ignore[no-untyped-call]
