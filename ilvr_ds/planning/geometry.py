"""The sizes of a Qwen2.5-VL and the weight counts that follow, without building the model.

Letters: D hidden size, I intermediate size, V rows of the embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TextSizes:
    """The language model."""

    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    """Rows of the embedding, including unused ones."""
    is_tied: bool
    """The head is the embedding."""

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of each linear layer of a decoder layer."""
        D, I = self.hidden_size, self.intermediate_size  # noqa: E741
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (D, queries),
            "k_proj": (D, keys),
            "v_proj": (D, keys),
            "o_proj": (queries, D),
            "gate_proj": (D, I),
            "up_proj": (D, I),
            "down_proj": (I, D),
        }

    @property
    def layer_matrices(self) -> int:
        """Weights of one decoder layer that are multiplied with tokens."""
        return sum(inputs * outputs for inputs, outputs in self.linears.values())

    @property
    def layer(self) -> int:
        """Weights of one decoder layer: matrices, biases of queries, keys and values, two norms."""
        biases = (self.heads + 2 * self.kv_heads) * self.head_dim
        return self.layer_matrices + biases + 2 * self.hidden_size

    @property
    def embedding(self) -> int:
        """Weights of the embedding, and of the head."""
        return self.vocab_size * self.hidden_size

    @property
    def language_model(self) -> int:
        """Embedding, layers and final norm: the teacher's weights."""
        return self.embedding + self.layers * self.layer + self.hidden_size

    @property
    def total(self) -> int:
        """The language model with its head."""
        return self.language_model + (0 if self.is_tied else self.embedding)

    def adapters(self, rank: int, targets: tuple[str, ...]) -> int:
        """Weights of LoRA adapters of `rank` on the linear layers named by `targets`."""
        sizes = [self.linears[name] for name in targets if name in self.linears]
        return self.layers * rank * sum(inputs + outputs for inputs, outputs in sizes)


@dataclass(frozen=True)
class VisionSizes:
    """The vision tower."""

    hidden_size: int
    depth: int
    heads: int
    intermediate_size: int
    out_hidden_size: int
    full_attention_blocks: int
    """Blocks that attend to the whole image; the others attend within windows."""
    patch_size: int
    temporal_patch_size: int
    merge_size: int
    channels: int = 3

    @property
    def patch_inputs(self) -> int:
        """Values of a patch."""
        return self.channels * self.temporal_patch_size * self.patch_size**2

    @property
    def block_matrices(self) -> int:
        """Weights of a block that are multiplied with patches."""
        D = self.hidden_size
        return 4 * D * D + 3 * D * self.intermediate_size

    @property
    def merger_matrices(self) -> int:
        """Weights of the merger that are multiplied with merged patches."""
        wide = self.hidden_size * self.merge_size**2
        return wide * wide + wide * self.out_hidden_size

    @property
    def total(self) -> int:
        """All weights of the tower."""
        D, wide = self.hidden_size, self.hidden_size * self.merge_size**2
        block = self.block_matrices + 4 * D + (2 * self.intermediate_size + D) + 2 * D  # biases, two norms
        merger = self.merger_matrices + D + wide + self.out_hidden_size
        return self.patch_inputs * D + self.depth * block + merger


@dataclass(frozen=True)
class Geometry:
    """A whole model."""

    text: TextSizes
    vision: VisionSizes

    @staticmethod
    def of(config: Any) -> Geometry:
        """The sizes in a transformers configuration of Qwen2.5-VL."""
        text, vision = config.text_config, config.vision_config
        heads = text.num_attention_heads
        return Geometry(
            TextSizes(
                hidden_size=text.hidden_size,
                layers=text.num_hidden_layers,
                heads=heads,
                kv_heads=text.num_key_value_heads,
                head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
                intermediate_size=text.intermediate_size,
                vocab_size=text.vocab_size,
                is_tied=bool(config.tie_word_embeddings),
            ),
            VisionSizes(
                hidden_size=vision.hidden_size,
                depth=vision.depth,
                heads=vision.num_heads,
                intermediate_size=vision.intermediate_size,
                out_hidden_size=vision.out_hidden_size,
                full_attention_blocks=len(vision.fullatt_block_indexes),
                patch_size=vision.patch_size,
                temporal_patch_size=vision.temporal_patch_size,
                merge_size=vision.spatial_merge_size,
            ),
        )


def _qwen(text: TextSizes, vision_intermediate: int = 3420) -> Geometry:
    vision = VisionSizes(
        1280, 32, 16, vision_intermediate, text.hidden_size, 4, patch_size=14, temporal_patch_size=2, merge_size=2
    )
    return Geometry(text, vision)


KNOWN = {
    "3b": _qwen(TextSizes(2048, 36, 16, 2, 128, 11008, 151936, is_tied=True)),
    "7b": _qwen(TextSizes(3584, 28, 28, 4, 128, 18944, 152064, is_tied=False)),
    "32b": _qwen(TextSizes(5120, 64, 40, 8, 128, 27648, 152064, is_tied=False), 3456),
    "72b": _qwen(TextSizes(8192, 80, 64, 8, 128, 29568, 152064, is_tied=False), 3456),
}
"""The released Qwen2.5-VL models, from their configurations."""
