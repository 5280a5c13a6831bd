"""The sizes of a model and the weight counts that follow, without building it.

Letters: D hidden size, I intermediate size, V rows of the embedding.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
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
    has_head_norms: bool = False
    """Qwen3-VL: norms on queries and keys, and no biases; Qwen2.5-VL: biases of queries, keys and values."""

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
        """Weights of one decoder layer: matrices, biases of queries, keys and values or their norms, two norms."""
        of_heads = 2 if self.has_head_norms else self.heads + 2 * self.kv_heads
        return self.layer_matrices + of_heads * self.head_dim + 2 * self.hidden_size

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
    deepstack: int = 0
    """Blocks whose merged features are added to the language model's states"""
    positions: int = 0
    """Learnt positions of Qwen3-VL, whose blocks have one wide layer and whose norms have biases; 0: Qwen2.5-VL, with
    gated layers and norms without biases"""

    @property
    def patch_inputs(self) -> int:
        """Values of a patch."""
        return self.channels * self.temporal_patch_size * self.patch_size**2

    @property
    def block_matrices(self) -> int:
        """Weights of a block that are multiplied with patches."""
        D = self.hidden_size
        return 4 * D * D + (2 if self.positions else 3) * D * self.intermediate_size

    @property
    def merger_matrices(self) -> int:
        """Weights of all mergers that are multiplied with merged patches."""
        wide = self.hidden_size * self.merge_size**2
        return (1 + self.deepstack) * (wide * wide + wide * self.out_hidden_size)

    @property
    def feature_width(self) -> int:
        """Numbers of a merged patch: those that stand among embeddings, and those that deepstack adds."""
        return (1 + self.deepstack) * self.out_hidden_size

    @property
    def total(self) -> int:
        """All weights of the tower."""
        D, wide = self.hidden_size, self.hidden_size * self.merge_size**2
        biases = (1 + self.deepstack) * (wide + self.out_hidden_size)  # of mergers
        if not self.positions:
            block = self.block_matrices + 4 * D + (2 * self.intermediate_size + D) + 2 * D  # biases, two norms
            return self.patch_inputs * D + self.depth * block + self.merger_matrices + biases + D
        block = self.block_matrices + 4 * D + (self.intermediate_size + D) + 4 * D
        norms = 2 * D + self.deepstack * 2 * wide  # of mergers
        patches = (self.patch_inputs + 1 + self.positions) * D
        return patches + self.depth * block + self.merger_matrices + biases + norms


@dataclass(frozen=True)
class Geometry:
    """A whole model."""

    text: TextSizes
    vision: VisionSizes

    @staticmethod
    def of(config: Any) -> Geometry:
        """The sizes in a transformers configuration of one of the families of model/families."""
        text, vision = config.text_config, config.vision_config
        heads, is_qwen3 = text.num_attention_heads, config.model_type == "qwen3_vl"
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
                has_head_norms=is_qwen3,
            ),
            VisionSizes(
                hidden_size=vision.hidden_size,
                depth=vision.depth,
                heads=vision.num_heads,
                intermediate_size=vision.intermediate_size,
                out_hidden_size=vision.out_hidden_size,
                full_attention_blocks=vision.depth if is_qwen3 else len(vision.fullatt_block_indexes),
                patch_size=vision.patch_size,
                temporal_patch_size=vision.temporal_patch_size,
                merge_size=vision.spatial_merge_size,
                deepstack=len(vision.deepstack_visual_indexes) if is_qwen3 else 0,
                positions=vision.num_position_embeddings if is_qwen3 else 0,
            ),
        )


def _qwen2_5(text: TextSizes, vision_intermediate: int = 3420) -> Geometry:
    vision = VisionSizes(
        1280, 32, 16, vision_intermediate, text.hidden_size, 4, patch_size=14, temporal_patch_size=2, merge_size=2
    )
    return Geometry(text, vision)


def _qwen3(text: TextSizes, hidden_size: int, depth: int, intermediate_size: int) -> Geometry:
    vision = VisionSizes(
        hidden_size, depth, 16, intermediate_size, text.hidden_size, depth, patch_size=16, temporal_patch_size=2,
        merge_size=2, deepstack=3, positions=2304,
    )  # fmt: skip
    return Geometry(replace(text, has_head_norms=True), vision)


KNOWN = {
    "3b": _qwen2_5(TextSizes(2048, 36, 16, 2, 128, 11008, 151936, is_tied=True)),
    "7b": _qwen2_5(TextSizes(3584, 28, 28, 4, 128, 18944, 152064, is_tied=False)),
    "32b": _qwen2_5(TextSizes(5120, 64, 40, 8, 128, 27648, 152064, is_tied=False), 3456),
    "72b": _qwen2_5(TextSizes(8192, 80, 64, 8, 128, 29568, 152064, is_tied=False), 3456),
    "qwen3-4b": _qwen3(TextSizes(2560, 36, 32, 8, 128, 9728, 151936, is_tied=True), 1024, 24, 4096),
    "qwen3-8b": _qwen3(TextSizes(4096, 36, 32, 8, 128, 12288, 151936, is_tied=False), 1152, 27, 4304),
}
"""Released models, from their configurations: Qwen2.5-VL and Qwen3-VL."""
HUB_NAMES = {
    "3b": "Qwen/Qwen2.5-VL-3B-Instruct",
    "7b": "Qwen/Qwen2.5-VL-7B-Instruct",
    "32b": "Qwen/Qwen2.5-VL-32B-Instruct",
    "72b": "Qwen/Qwen2.5-VL-72B-Instruct",
    "qwen3-4b": "Qwen/Qwen3-VL-4B-Instruct",
    "qwen3-8b": "Qwen/Qwen3-VL-8B-Instruct",
}
"""Where each of KNOWN is published"""
RELEASES = {name: hub.partition("/")[2].removesuffix("-Instruct").lower() for name, hub in HUB_NAMES.items()}
"""What a path of one holds, in lower case"""
