"""A latent slot's pass through all layers, recorded once as CUDA graphs and then replayed.

One token a row is little work for the device and a thousand launches for the host, more in the backward. Replayed, a
pass is one launch each way. Graphs need everything at a fixed place: inputs, keys and values, and the sums of the
weights' gradients stand in memory of this module, and only the number of rows and that of columns, rounded up, make a
new recording. The forward keeps nothing but its input; the backward's graph computes the pass again.

Weights must lie whole and still on the device (ZeRO-1 and 2). On a CPU the same code runs unrecorded.

Letters: B rows, U columns of the layout, G heads of keys and values, D, d.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ilvr_ds.model.layers.cached_attention import CachedCall, FixedMemory, LayerMemory

logger = logging.getLogger("ilvr_ds")

GRAIN = 256
"""Columns are rounded up to a multiple of this: fewer recordings, and a few more columns that attention skips over."""
SHAPES = 16
"""Most recordings that are kept: those used last."""


class LatentPasses:
    """The recordings of one language model, by shape. It must use the attention of model/layers/cached_attention.py.

    has_backward False: for passes without gradients only, which need no memory for them.
    """

    def __init__(self, language_model: Any, sums_in_fp32: bool = True, has_backward: bool = True) -> None:
        self.body = _Body(language_model)
        self.has_backward = has_backward
        self.weights = [weight for weight in self.body.parameters() if weight.requires_grad and has_backward]
        self.sums_in_fp32 = sums_in_fp32
        self.sums: list[Tensor] = []
        """Gradients of `weights` from all passes of a micro-batch, in float32 or in the weights' precision."""
        self.buffer = torch.empty(0)
        """Keys, values and their gradients of the largest shape so far; only one micro-batch is under way."""
        self.turn = 0
        """Counts micro-batches, and backwards that have ended."""
        self._shapes: dict[tuple[int, int], LatentPass] = {}
        self._places: list[int] = []
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None
        """Of all recordings: a pool is shared by those of one stream, and so are workspaces of matrix products."""

    def begin(self, positions: tuple[Tensor, Tensor], real: Tensor) -> LatentPass:
        """The passes of a micro-batch, whose forward and backward must end before another begins.

        positions: cosines and sines [..., B, U, d]; real [B, U]: columns that hold a token.
        """
        rows, columns = real.shape[0], -(-real.shape[1] // GRAIN) * GRAIN
        self._reserve((1 + self.has_backward) * len(self.body.layers) * rows * columns * self.body.elements)
        shape = self._shapes.pop((rows, columns), None) or LatentPass(self, rows, columns, positions[0])
        self._shapes[rows, columns] = shape
        while len(self._shapes) > SHAPES:
            del self._shapes[next(iter(self._shapes))]
        needs_grads = torch.is_grad_enabled()
        assert self.has_backward or not needs_grads, "made for passes without gradients"
        with torch.no_grad():
            shape.prepare(positions, real, needs_grads)
        self.turn += 1
        return shape

    def _reserve(self, size: int) -> None:
        """Allocate what recordings know by its address; drop the recordings where something has moved."""
        places = [weight.data_ptr() for weight in self.body.parameters()]
        if places == self._places and size <= self.buffer.numel():
            return
        self._shapes.clear()
        self._places = places
        self.sums = self.sums or [torch.zeros_like(weight, dtype=self._sum_of(weight)) for weight in self.weights]
        size = max(size, self.buffer.numel())
        self.buffer = torch.empty(0)  # free before the larger one is taken
        self.buffer = self.body.norm.weight.new_zeros(size)
        if self.buffer.is_cuda:
            self._pool = torch.cuda.graph_pool_handle()
            self._stream = self._stream or torch.cuda.Stream(self.buffer.device)  # type: ignore[no-untyped-call]

    def _sum_of(self, weight: Tensor) -> torch.dtype:
        return torch.promote_types(weight.dtype, torch.float32) if self.sums_in_fp32 else weight.dtype

    def recorded(self, function: Callable[[], None]) -> Callable[[], None]:
        """A replay of `function`, which must read and write tensors at fixed addresses only."""
        device, stream = self.buffer.device, self._stream
        if stream is None:
            return function
        graph = torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            function()  # compiles kernels and takes workspaces, which cannot be done while recording
        torch.cuda.current_stream(device).wait_stream(stream)
        # other threads (NCCL's, the loader's) may go on with what they do
        with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
            function()
        return graph.replay


class LatentPass:
    """One shape: a callable for the passes of a micro-batch."""

    def __init__(self, passes: LatentPasses, rows: int, columns: int, like: Tensor) -> None:
        logger.info("recording the pass of a latent slot: %d rows, %d columns", rows, columns)
        self.owner, self.body = passes, passes.body
        blank: Tensor = self.body.norm.weight.new_zeros(rows, 1, len(self.body.norm.weight))
        self.hidden, self.output = blank.clone(), blank.clone()
        self.grad_output, self.grad_input = blank.clone(), blank
        self.column = torch.zeros(1, dtype=torch.int64, device=like.device)
        self.real = torch.zeros(rows, columns, dtype=torch.bool, device=like.device)
        self.positions = tuple(like.new_zeros(*like.shape[:-2], columns, like.shape[-1]) for _ in range(2))
        layers, (heads, width) = len(self.body.layers), self.body.heads
        shape = (layers, 1 + passes.has_backward, 2, rows, heads, columns, width)
        """Layers; values and, if there is a backward, their gradients; keys or values"""
        self.buffer = passes.buffer[: torch.Size(shape).numel()].view(shape)
        self._forward: Callable[[], None] | None = None
        self._backward: Callable[[], None] | None = None
        self._is_first = True

    def memories(self) -> list[LayerMemory]:
        """Of each layer, for calls that are not recorded."""
        return [LayerMemory(self.real.shape[1], held, grads) for held, grads in self._held_and_grads()]

    def _held_and_grads(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        for held, *grads in self.buffer:
            yield held, grads[0] if grads else None

    def prepare(self, positions: tuple[Tensor, Tensor], real: Tensor, needs_grads: bool) -> None:
        """Copy what all passes of a micro-batch share; record what is not recorded yet."""
        for own, given in zip(self.positions, positions, strict=True):
            own[..., : given.shape[-2], :].copy_(given)
        self.real.zero_()[:, : real.shape[1]] = real
        if self._forward is None:
            self._forward = self.owner.recorded(self._compute)
        if needs_grads and self._backward is None:
            self._backward = self.owner.recorded(self._compute_backward)
        self.buffer.zero_()  # a column that is masked must still hold numbers
        if needs_grads:
            torch._foreach_zero_(self.owner.sums)
        self._is_first = True

    def __call__(self, hidden: Tensor, column: int, after: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
        """hidden [B, 1, D] of `column` -> last hidden state [B, 1, D], and what calls after this one come after.

        after: what the layers' calls before this one left in `done`.
        """
        weights = self.owner.weights if self._is_first else []
        self._is_first = False
        result: tuple[Tensor, Tensor] = _Replayed.apply(self, column, hidden, *after, *weights)  # type: ignore
        return result

    def forward(self, hidden: Tensor, column: int) -> Tensor:
        """Of one pass, without gradients."""
        self._place(hidden, column)
        assert self._forward is not None
        self._forward()
        return self.output.clone()

    def backward(self, hidden: Tensor, column: int, grad_output: Tensor) -> Tensor:
        """The gradient of `hidden`; those of keys, values and weights are added to what later passes left."""
        self._place(hidden, column)
        self.grad_output.copy_(grad_output)
        assert self._backward is not None, "no backward was recorded: the forward ran without gradients"
        self._backward()
        return self.grad_input.clone()

    def _place(self, hidden: Tensor, column: int) -> None:
        self.hidden.copy_(hidden)
        self.column.fill_(column)

    @torch.no_grad()
    def _compute(self) -> None:
        self.output.copy_(self._run(self.hidden, {}))

    def _compute_backward(self) -> None:
        hidden = self.hidden.detach().requires_grad_()
        hidden.grad = self.grad_input.zero_()
        weights: dict[str, Tensor] = {
            name: nn.Parameter(weight.detach(), weight.requires_grad) for name, weight in self.body.named_parameters()
        }
        trained = [weight for weight in weights.values() if weight.requires_grad]
        for weight, total in zip(trained, self.owner.sums, strict=True):
            if total.dtype == weight.dtype:
                weight.grad = total  # added to in place, layer by layer
            else:
                weight.register_post_accumulate_grad_hook(partial(_move_gradient, total))  # type: ignore[no-untyped-call]
        with torch.enable_grad():
            output = self._run(hidden, weights)
        torch.autograd.backward(output, self.grad_output, inputs=[hidden, *trained])

    def _run(self, hidden: Tensor, weights: dict[str, Tensor]) -> Tensor:
        order = torch.arange(self.real.shape[1], device=hidden.device)
        is_seen = (self.real & (order <= self.column))[:, None, None]
        mask = torch.zeros_like(is_seen, dtype=hidden.dtype).masked_fill_(~is_seen, float("-inf"))
        positions = tuple(x.index_select(-2, self.column) for x in self.positions)
        memories = [FixedMemory(self.column, held, grads) for held, grads in self._held_and_grads()]
        arguments = (hidden, mask, positions, memories)
        result: Tensor = torch.func.functional_call(self.body, weights, arguments)
        return result


def _move_gradient(total: Tensor, weight: Tensor) -> None:
    """Add a weight's gradient of one pass to the sum over passes, and free it."""
    assert weight.grad is not None
    total += weight.grad
    weight.grad = None


class _Body(nn.Module):
    """The decoder layers and the final norm, on one column: a latent, to which no family adds anything."""

    def __init__(self, language_model: Any) -> None:
        super().__init__()
        self.layers = language_model.layers
        self.norm = language_model.norm
        config = language_model.config
        self.heads = config.num_key_value_heads, self.layers[0].self_attn.head_dim
        self.elements = 2 * self.heads[0] * self.heads[1]
        """Of keys and values of a column of a row"""

    def forward(
        self, hidden: Tensor, mask: Tensor, positions: tuple[Tensor, Tensor], memories: list[LayerMemory]
    ) -> Tensor:
        for layer, memory in zip(self.layers, memories, strict=True):
            call = CachedCall(memory, 0, None)
            hidden = layer(hidden, attention_mask=mask, position_embeddings=positions, past_key_values=call)
        output: Tensor = self.norm(hidden)
        return output


class _Replayed(torch.autograd.Function):
    """One pass. The first of a micro-batch, whose backward is the last, hands on the gradients of all."""

    @staticmethod
    def forward(ctx: Any, latent_pass: LatentPass, column: int, hidden: Tensor, *others: Tensor) -> Any:
        ctx.save_for_backward(hidden)
        owner = latent_pass.owner
        ctx.call = latent_pass, column, owner.turn, len(others), len(others) > len(latent_pass.body.layers)
        return latent_pass.forward(hidden, column), hidden.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (hidden,) = ctx.saved_tensors
        latent_pass, column, turn, others, is_first = ctx.call
        owner = latent_pass.owner
        if turn != owner.turn:
            raise RuntimeError("the memory of these latent passes has been used for another micro-batch since")
        of_hidden = latent_pass.backward(hidden, column, grads[0])
        of_weights = [s.to(w.dtype) for s, w in zip(owner.sums, owner.weights, strict=True)] if is_first else []
        owner.turn += is_first
        return None, None, of_hidden, *[None] * (others - len(of_weights)), *of_weights
