"""What a decoding step knows of each row beside its keys and values, at fixed places on the device.

Letters: R rows that there is room for, E steps between two looks, U columns, T new tokens at most, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ilvr_ds.generation.row_modes import RowModes

LOOK_EVERY = 16
"""E: steps between two looks at finished rows; each look waits for the device."""


@dataclass
class RowState:
    """Of R rows, changed in place. A row without a prompt is finished and reads one column of its own."""

    modes: RowModes
    hidden: Tensor
    """[R, D] last hidden states: of these the next tokens are drawn, and these are fed back"""
    latents: Tensor
    """[R, D] what is fed where it is not the hidden states"""
    tokens: Tensor
    """[R] int64 that were emitted last"""
    length: Tensor
    """[R] int64 columns in use"""
    position: Tensor
    """[R] int64 of the last token that was read: a prompt ends in text, so its three axes agree from there on"""
    count: Tensor
    """[R] int64 tokens emitted so far"""
    limit: Tensor
    """[R] int64 at which a row is finished"""
    uniform: Tensor
    """[R, T] float32 the numbers by which tokens are sampled"""
    barred: Tensor
    """[R, U] bool columns that are out of sight where the modes say so"""
    temperature: Tensor
    top_p: Tensor
    """[1] float32"""
    tick: Tensor
    """[1] int64 steps since the last look"""
    emitted: Tensor
    """[E, R] int64 tokens since the last look"""
    fed: Tensor
    """[E, R, D] latents of these steps"""

    @staticmethod
    def blank(modes: RowModes, columns: int, like: Tensor, width: int) -> RowState:
        """R rows, those of `modes`, without a prompt; like: a weight of the model's device and precision."""
        rows, device = len(modes.left), like.device
        modes.finished.fill_(True)

        def numbers(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        return RowState(
            modes=modes,
            hidden=like.new_zeros(rows, width),
            latents=like.new_zeros(rows, width),
            tokens=numbers(rows),
            length=numbers(rows),
            position=numbers(rows),
            count=numbers(rows),
            limit=numbers(rows),
            uniform=torch.zeros(rows, columns, device=device),
            barred=torch.zeros(rows, columns, dtype=torch.bool, device=device),
            temperature=torch.ones(1, device=device),
            top_p=torch.ones(1, device=device),
            tick=numbers(1),
            emitted=numbers(LOOK_EVERY, rows),
            fed=like.new_zeros(LOOK_EVERY, rows, width),
        )

    def first(self, rows: int) -> RowState:
        """The first rows alone; changing them changes these."""
        parts: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        shared = {name: parts[name] for name in ("temperature", "top_p", "tick")}
        columns = {name: parts[name][:, :rows] for name in ("emitted", "fed")}
        rest = {name: part for name, part in parts.items() if name not in (*shared, *columns, "modes")}
        return RowState(
            modes=self.modes.first(rows), **{name: part[:rows] for name, part in rest.items()}, **shared, **columns
        )

    def take_over(self, before: RowState) -> None:
        """What `before` says of its rows, which are no more and have no more columns."""
        mine = self.first(len(before.length))
        for new, old in zip(mine._of_rows(), before._of_rows(), strict=True):
            part = new if new.dim() == 1 else new[:, : old.shape[1]]
            part.copy_(old)
        for name in ("temperature", "top_p", "tick"):
            getattr(self, name).copy_(getattr(before, name))
        self.modes.steps.copy_(before.modes.steps)

    def _of_rows(self) -> list[Tensor]:
        """Of each row, but what came of the steps since the last look."""
        modes = self.modes
        own = [self.hidden, self.length, self.position, self.count, self.limit, self.uniform, self.barred]
        return [*own, modes.left, modes.segment, modes.finished]

    def changed_by_steps(self) -> list[Tensor]:
        """What a step changes, besides keys and values."""
        modes = self.modes
        own = [self.hidden, self.tokens, self.length, self.position, self.count, self.tick]
        return [*own, modes.left, modes.segment, modes.finished]

    def move(self, sources: Tensor, targets: Tensor) -> None:
        """Copy the rows `sources` over the rows `targets` [n], which are others; what the last look saw stays."""
        for part in self._of_rows():
            part.index_copy_(0, targets, part[sources])
        self.end(sources)

    def end(self, rows: Tensor) -> None:
        """Finish rows [n]. At their length they would go on writing, and that may be where the next row begins; and of
        the column that is theirs then nothing may be barred: attention to no column is no number."""
        self.modes.finished.index_fill_(0, rows, True)
        self.modes.segment.index_fill_(0, rows, -1)
        self.length.index_fill_(0, rows, 0)
