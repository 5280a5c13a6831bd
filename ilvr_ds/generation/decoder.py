"""Decoding at the limit of memory: a whole step of all rows as one CUDA graph.

A step draws each row's next token, or takes its latent, and reads it: modes, sampling, the ends of answers, embeddings,
all layers. Everything it touches stands at a fixed place, and it looks at no value, so the host launches it as one
graph and reads what came of it every few steps. On a CPU the same step runs without a graph; only tests do that, for
the plain loop (generate.py) is as fast there.

Letters: R rows that there is room for, B rows of a step, U columns, C columns that a step may look at, G, d.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ilvr_ds.generation.decode_layers import (
    Attend,
    DecodeLayer,
    attend_by_length,
    attend_by_mask,
    can_attend_by_length,
)
from ilvr_ds.generation.matvec import product
from ilvr_ds.generation.rotate import Rotation
from ilvr_ds.generation.row_modes import Barred, RowModes
from ilvr_ds.generation.row_state import RowState
from ilvr_ds.generation.sampling import choose_tokens

if TYPE_CHECKING:
    from ilvr_ds.generation.loading import Reasoner

logger = logging.getLogger("ilvr_ds")

GRAIN = 256
"""Columns are rounded up to a multiple of this: fewer recordings, and a few more columns that nobody looks at."""
RECORDINGS = 24
"""Most recordings that are kept: those used last."""


@dataclass(frozen=True)
class Program:
    """What makes a step another one; all else are numbers on the device."""

    is_sampled: bool = False
    never: tuple[int, ...] = ()
    """Tokens that are not drawn"""
    forced: tuple[tuple[int, int], ...] = ()
    """Numbers of new tokens, and what they are"""
    barred: Barred | None = None


class Parts(NamedTuple):
    """A step of some rows: all of it, or drawing and reading apart, with other latents made between them."""

    whole: Callable[[], None]
    choose: Callable[[], None]
    read: Callable[[], None]


class Decoder:
    """The rows of one model that answer together. Its weights must stay where they are."""

    def __init__(self, reasoner: Reasoner) -> None:
        self.reasoner = reasoner
        self.language_model = reasoner.model.model.language_model
        self.embed = reasoner.model.get_input_embeddings()
        self.head = reasoner.model.lm_head
        self.layers = [DecodeLayer(layer) for layer in self.language_model.layers]
        self.dtype = self.embed.weight.dtype
        self.by_length = can_attend_by_length(reasoner.device, self.dtype)
        self.rows = self.columns = 0
        """R and U of the buffers as they are"""
        self.held = [self.embed.weight.new_empty(2, 0, 0, 1, 1) for _ in self.layers]
        """Keys and values of each layer, [2, R, U, G, d]"""
        self.state: RowState
        self.lock = threading.Lock()
        """Held by who answers: the rows are one thread's"""
        self._recorded: dict[tuple[int, int, Program], Parts] = {}
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None

    def reserve(self, rows: int, columns: int, keeps: bool = True) -> RowState:
        """Have room for `rows` of `columns`; what is recorded is recorded anew where there was less.

        keeps: what stands in the rows stays there; else there may be fewer or shorter ones afterwards.
        """
        if rows <= self.rows and columns <= self.columns:
            return self.state
        self._recorded.clear()
        before = self.state if keeps and self.rows else None
        if keeps:
            rows, columns = max(rows, self.rows), max(columns, self.columns)
        self.rows = self.columns = 0  # where memory ends before all is there, the next call begins anew
        columns = -(-columns // GRAIN) * GRAIN
        reasoner, width = self.reasoner, self.language_model.config.hidden_size
        modes = RowModes.start(reasoner.special, reasoner.stop_ids, rows, reasoner.latent_size, reasoner.device)
        state = RowState.blank(modes, columns, self.embed.weight, width)
        if before is not None:
            state.take_over(before)
        self.state = state
        if not keeps:
            self.held = [held.new_empty(2, 0, 0, 1, 1) for held in self.held]
        for number, layer in enumerate(self.layers):  # memory need not have room for all of them twice
            shape = (2, rows, columns, layer.groups, layer.attention.head_dim)
            held = self.embed.weight.new_zeros(shape)  # a column that is masked must still hold numbers
            old = self.held[number]
            held[:, : old.shape[1], : old.shape[2]] = old
            self.held[number] = held
        self.rows, self.columns = rows, columns
        if self.embed.weight.is_cuda:
            self._pool = torch.cuda.graph_pool_handle()
            self._stream = self._stream or torch.cuda.Stream(self.embed.weight.device)  # type: ignore[no-untyped-call]
        return self.state

    def forget(self) -> None:
        """Record steps anew: something that they are made of has changed."""
        self._recorded.clear()

    def bytes_of(self, rows: int, columns: int) -> int:
        """What the keys and values of so many rows and columns take."""
        layer = self.layers[0]
        numbers = 2 * len(self.layers) * rows * columns * layer.groups * layer.attention.head_dim
        return int(numbers * self.embed.weight.element_size())

    def move(self, sources: list[int], targets: list[int]) -> None:
        """Copy rows over others, and finish the ones that they were."""
        at, to = (torch.tensor(rows, device=self.reasoner.device) for rows in (sources, targets))
        for layer in self.held:
            layer.index_copy_(1, to, layer.index_select(1, at))
        self.state.move(at, to)

    def parts(self, rows: int, columns: int, program: Program) -> Parts:
        """The step of the first `rows`, none of which looks at or writes beyond `columns`.

        Recorded now where it was not, which leaves everything as it is.
        """
        columns = self.columns if self._sees_lengths(program) else min(-(-columns // GRAIN) * GRAIN, self.columns)
        key = (rows, columns, program)
        found = self._recorded.pop(key, None) or self._record(*key)
        self._recorded[key] = found
        while len(self._recorded) > RECORDINGS:
            del self._recorded[next(iter(self._recorded))]
        return found

    def _sees_lengths(self, program: Program) -> bool:
        return self.by_length and program.barred is None

    def _record(self, rows: int, columns: int, program: Program) -> Parts:
        step = _Step(self, rows, columns, program)
        if self._stream is None:
            return Parts(step.whole, step.choose, step.read)
        logger.info("recording a decoding step: %d rows, %d columns", rows, columns)
        return Parts(*map(self._replayed, (step.whole, step.choose, step.read)))

    def _replayed(self, function: Callable[[], None]) -> Callable[[], None]:
        """Recorded when it is first called, for of the three parts one or two are used."""
        graph: torch.cuda.CUDAGraph | None = None

        def call() -> None:
            nonlocal graph
            if graph is None:
                graph = self._graph_of(function)
            graph.replay()

        return call

    def _graph_of(self, function: Callable[[], None]) -> torch.cuda.CUDAGraph:
        device, stream = self.reasoner.device, self._stream
        assert stream is not None
        changed = self.state.changed_by_steps()
        before = [tensor.clone() for tensor in changed]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            function()  # compiles kernels and takes workspaces, which cannot be done while recording
        torch.cuda.current_stream(device).wait_stream(stream)
        for tensor, value in zip(changed, before, strict=True):
            tensor.copy_(value)
        graph = torch.cuda.CUDAGraph()
        # other threads (a server's, the loader's) may go on with what they do
        with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
            function()
        return graph


class _Step:
    """Of the first B rows, looking at C columns."""

    def __init__(self, decoder: Decoder, rows: int, columns: int, program: Program) -> None:
        self.decoder, self.program = decoder, program
        self.state = decoder.state.first(rows)
        self.held = [held[:, :rows] for held in decoder.held]
        device = decoder.reasoner.device
        self.order = torch.arange(columns, device=device)
        self.starts = torch.arange(rows, device=device) * decoder.columns
        self.never = torch.tensor(program.never, dtype=torch.int64, device=device)
        last = max((number for number, _ in program.forced), default=-1)
        table = torch.full((last + 2,), -1)
        for number, token in program.forced:
            table[number] = token
        self.forced = table.to(device)
        """[last forced number + 2] int64; -1: not forced, as all that come later"""

    def whole(self) -> None:
        """Draw, and feed the model's own states."""
        self.choose()
        self._read(self.state.hidden)

    def choose(self) -> None:
        """Draw the next tokens and note them; no token of a row that is finished counts."""
        state = self.state
        was_finished = state.modes.finished.clone()
        tokens = state.modes.advance(self._draw())
        state.tokens.copy_(tokens)
        state.count.add_(~was_finished)
        state.modes.finished.logical_or_(state.count >= state.limit)
        state.emitted.index_copy_(0, state.tick, tokens[None])

    def read(self) -> None:
        """Read the tokens that were drawn, with `latents` where they are latent."""
        self._read(self.state.latents)

    def _draw(self) -> Tensor:
        state, program = self.state, self.program
        logits = product(state.hidden, self.decoder.head.weight, None)
        if program.never:
            logits = logits.index_fill_(-1, self.never, -torch.inf)
        if program.is_sampled:
            last = state.uniform.shape[1] - 1
            uniform = state.uniform.gather(1, state.count.clamp(max=last)[:, None])[:, 0]
            chosen = choose_tokens(logits, state.temperature, state.top_p, uniform)
        else:
            chosen = logits.argmax(-1)
        if program.forced:
            told = self.forced[state.count.clamp(max=len(self.forced) - 1)]
            chosen = torch.where(told >= 0, told, chosen)
        return chosen

    def _read(self, latents: Tensor) -> None:
        state, model = self.state, self.decoder.language_model
        state.fed.index_copy_(0, state.tick, latents[None])
        is_latent = (state.tokens == self.decoder.reasoner.special.latent_pad)[:, None]
        hidden = torch.where(is_latent, latents, self.decoder.embed(state.tokens))
        state.position.add_(1)
        rotation = Rotation(*model.rotary_emb(hidden[:, None], state.position.expand(3, -1)[..., None]))
        attend = self._attend()
        columns = self.starts + state.length
        for layer, (keys, values) in zip(self.decoder.layers, self.held, strict=True):
            hidden = layer(hidden, rotation, columns, keys, values, attend)
        state.hidden.copy_(model.norm(hidden))
        state.length.add_(~state.modes.finished)  # one that is finished writes at the same column again
        state.tick.add_(1)

    def _attend(self) -> Attend:
        state, barred = self.state, self.program.barred
        if self.decoder._sees_lengths(self.program):
            return attend_by_length(state.length + 1, self.decoder.columns)
        seen = self.order <= state.length[:, None]
        if barred is not None:
            out_of_sight = state.barred[:, : len(self.order)] & state.modes.is_barred(barred)[:, None]
            seen = seen & ~out_of_sight
        return attend_by_mask(seen, self.decoder.dtype)
