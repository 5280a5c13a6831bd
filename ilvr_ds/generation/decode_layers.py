"""One token of each row through the decoder layers, over keys and values that stand at fixed places.

The weights are those of the stock layers; what is done with them is written out, because at one token a row the small
operations between matrix products are a third of the time: one product makes queries, keys and values, rotations take
three operations, products add to the residual themselves, and each row writes at a column of its own.

Letters: B rows, H heads of queries, G of keys and values, U columns, d numbers of a head, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from ilvr_ds.generation.matvec import add_product, gated, product
from ilvr_ds.generation.rotate import Rotation, rotate_and_keep
from ilvr_ds.model.layers.fused import SILU

Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""queries [B, H, d], keys and values [B, U, G, d], scale -> [B, H, d]"""


class DecodeLayer:
    """A stock decoder layer, whose projections to queries, keys and values become parts of one matrix."""

    def __init__(self, layer: Any) -> None:
        attention = layer.self_attn
        self.layer, self.attention = layer, attention
        others = attention.o_proj, layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj
        if any(projection.bias is not None for projection in others) or not isinstance(layer.mlp.act_fn, SILU):
            raise NotImplementedError("a decoder layer with other biases or another activation than Qwen's")
        self.weight, self.bias = _joined(attention.q_proj, attention.k_proj, attention.v_proj)
        self.heads = attention.q_proj.weight.shape[0] // attention.head_dim
        self.groups = attention.k_proj.weight.shape[0] // attention.head_dim

    def __call__(
        self, hidden: Tensor, rotation: Rotation, columns: Tensor, keys: Tensor, values: Tensor, attend: Attend
    ) -> Tensor:
        """hidden [B, D] is changed in place, and returned; columns [B]: where each row writes in keys and values
        [B, U, G, d], counted in rows laid end to end."""
        layer, attention, H, G = self.layer, self.attention, self.heads, self.groups
        made = product(hidden, self.weight, self.bias, layer.input_layernorm)
        made = made.view(len(hidden), H + 2 * G, attention.head_dim)
        flat = keys.flatten(0, 1), values.flatten(0, 1)
        queries = rotate_and_keep(rotation, self._normed(made), made, columns, *flat)
        read = attend(queries, keys, values, attention.scaling)
        add_product(hidden, read.flatten(1), attention.o_proj.weight)
        mlp = layer.mlp
        between = gated(hidden, mlp.gate_proj.weight, mlp.up_proj.weight, layer.post_attention_layernorm)
        return add_product(hidden, between, mlp.down_proj.weight)

    def _normed(self, made: Tensor) -> Tensor:
        """Queries and keys [B, H + G, d], with norms where the family has some."""
        H, G = self.heads, self.groups
        if not hasattr(self.attention, "q_norm"):
            return made[:, : H + G]
        parts = self.attention.q_norm(made[:, :H]), self.attention.k_norm(made[:, H : H + G])
        return torch.cat(parts, dim=1)


@torch.no_grad()
def _joined(*projections: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """Their weights and biases one under the other; the projections keep theirs as parts of them, in no more memory."""
    weight = _share([projection.weight for projection in projections])
    biases = [projection.bias for projection in projections if projection.bias is not None]
    assert len(biases) in (0, len(projections))
    return weight, _share(biases) if biases else None


def _share(parts: list[Any]) -> Tensor:
    with torch.inference_mode(False):  # a weight stays one that autograd may see
        whole = torch.cat([part.detach() for part in parts])
        for part, rows in zip(parts, torch.split(whole, [len(part) for part in parts]), strict=True):
            part.data = rows
    return whole


def attend_by_length(lengths: Tensor, columns: int) -> Attend:
    """Each row sees its first `lengths` [B] of `columns` columns: PyTorch's flash attention, in 16 bit on a GPU.

    It splits long rows over the whole device, and reads no column beyond a row's length.
    """
    rows = len(lengths)
    ends = torch.arange(rows + 1, dtype=torch.int32, device=lengths.device)
    key_ends, seen = ends * columns, lengths.int()

    def attend(queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        assert keys.shape[1] == columns
        flat = keys.flatten(0, 1), values.flatten(0, 1)
        return _flash(queries.contiguous(), *flat, ends, key_ends, columns, seen, scale)

    return attend


def attend_by_mask(seen: Tensor, dtype: torch.dtype) -> Attend:
    """Each row sees the columns where `seen` [B, C] is true, of the first C: on any device, in any precision.

    The heads of a group are the group's queries, so that keys need not be repeated.
    """
    mask = torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, float("-inf"))[:, None, None]

    def attend(queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        B, H, d = queries.shape
        grouped = queries.reshape(B, keys.shape[2], -1, d)
        k, v = (x[:, : seen.shape[1]].transpose(1, 2) for x in (keys, values))
        return scaled_dot_product_attention(grouped, k, v, mask, scale=scale).reshape(B, H, d)

    return attend


def can_attend_by_length(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether PyTorch's flash attention runs here."""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _flash(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: Tensor,
    key_starts: Tensor,
    columns: int,
    seen: Tensor,
    scale: float,
) -> Tensor:
    """queries [B, H, d] against the first `seen` of each row's keys and values [B * U, G, d].

    The operator beneath `torch.nn.attention.varlen`: in torch 2.11 that cannot be told `seen`.
    """
    output: Tensor = torch.ops.aten._flash_attention_forward(
        queries, keys, values, starts, key_starts, 1, columns, 0.0, False, False, scale=scale, seqused_k=seen
    )[0]
    return output
