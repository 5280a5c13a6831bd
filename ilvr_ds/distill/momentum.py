"""The teacher's weights follow the student's: an exponential moving average in float32, shard by shard.

Every rank holds the same slice of both networks, so the update needs no communication. In bf16 it would stand still:
1e-3 of a small difference is below half a unit in the last place.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

PIECE = 2**25
"""Elements that are moved at a time: 128 MiB of float32, a power of two because pinned memory comes in those."""
STREAMS = 3
"""Streams that pieces are handed out to in turn."""


class _Piece(NamedTuple):
    """Elements [start, stop) of the flat shard of parameter `number`, and their average."""

    number: int
    start: int
    stop: int
    average: Tensor


class MomentumShards:
    """This rank's float32 averages, and how they reach the network that the teacher runs.

    `published[i]` is the flat shard of parameter i that the teacher's network reads, in the network's dtype, in host
    memory or on the device; the averages rest where it rests. `device` is where the arithmetic is done: averages in
    host memory stream through it in pieces, because the host's own arithmetic takes longer than a training step.
    """

    def __init__(self, published: list[Tensor], initial: Iterable[Tensor], momentum: float, device: torch.device):
        self.published = published
        self.momentum = momentum
        self.device = device
        self.pieces: list[_Piece] = []
        for number, (shard, values) in enumerate(zip(published, initial, strict=True)):
            for start in range(0, shard.numel(), PIECE):
                stop = min(start + PIECE, shard.numel())
                pinned = device.type == "cuda" and shard.device.type == "cpu"
                average = torch.empty(stop - start, dtype=torch.float32, device=shard.device, pin_memory=pinned)
                average.copy_(values.flatten()[start:stop])
                self.pieces.append(_Piece(number, start, stop, average))

    @torch.no_grad()
    def update(self, student: Iterable[Tensor]) -> Tensor:
        """average <- momentum * average + (1 - momentum) * student, and publish it.

        `student` yields the float32 shards in the order of the parameters. Returns [2] float32 on `device`: the sums
        of (average - student)^2 and student^2 over this rank, from which the drift is made.
        """
        sums = torch.zeros(2, dtype=torch.float32, device=self.device)
        streams = _streams(self.device)
        pieces = iter(self.pieces)
        piece = next(pieces, None)
        turn = 0
        for number, shard in enumerate(student):
            while piece is not None and piece.number == number:
                values = shard.flatten()[piece.start : piece.stop]
                if streams:
                    stream = streams[turn % STREAMS]
                    stream.wait_stream(torch.cuda.current_stream())
                    with torch.cuda.stream(stream):
                        self._advance(piece, values, partial := torch.zeros_like(sums))
                    torch.cuda.current_stream().wait_stream(stream)
                    sums += partial
                else:
                    self._advance(piece, values, sums)
                turn += 1
                piece = next(pieces, None)
        if streams:
            # the teacher's next forward reads `published` from the host: it must be there
            torch.cuda.synchronize(self.device)
        return sums

    def _advance(self, piece: _Piece, student: Tensor, sums: Tensor) -> None:
        student = student.to(self.device, torch.float32, non_blocking=True)
        average = piece.average.to(self.device, non_blocking=True)
        average.lerp_(student, 1 - self.momentum)
        sums += torch.stack([(average - student).square().sum(), student.square().sum()])
        if average is not piece.average:
            piece.average.copy_(average, non_blocking=True)
        self.published[piece.number].flatten()[piece.start : piece.stop].copy_(average, non_blocking=True)

    def state(self) -> list[Tensor]:
        """The averages as one flat float32 tensor per parameter, on the CPU."""
        parts: list[list[Tensor]] = [[] for _ in self.published]
        for piece in self.pieces:
            parts[piece.number].append(piece.average.cpu())
        return [torch.cat(part) if part else torch.empty(0) for part in parts]

    @torch.no_grad()
    def load_state(self, state: list[Tensor]) -> None:
        """Take over what `state` gave, and publish it. Raises ValueError where a shard has another size."""
        for shard, values in zip(self.published, state, strict=True):
            if shard.numel() != values.numel():
                raise ValueError(f"a teacher shard has {shard.numel()} elements, the stored one {values.numel()}")
            shard.flatten().copy_(values)
        for piece in self.pieces:
            piece.average.copy_(state[piece.number][piece.start : piece.stop])


def _streams(device: torch.device) -> list[torch.cuda.Stream]:
    return [torch.cuda.Stream(device) for _ in range(STREAMS)] if device.type == "cuda" else []  # type: ignore[no-untyped-call]
