"""The sizes of a model and the weight counts that follow, without building it.

Letters: D hidden size, I intermediate size, V rows of the embedding.
"""

from __future__ import annotations

from dataclasses import dataclass


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
    """Norms on queries and keys, and no biases; else biases of queries, keys and values."""

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
    """Learnt positions"""
    is_gated: bool = True
    """Blocks have gated layers, and norms and patches no biases; else one wide layer, and biases everywhere"""

    @property
    def patch_inputs(self) -> int:
        """Values of a patch."""
        return self.channels * self.temporal_patch_size * self.patch_size**2

    @property
    def block_matrices(self) -> int:
        """Weights of a block that are multiplied with patches."""
        D = self.hidden_size
        return 4 * D * D + (3 if self.is_gated else 2) * D * self.intermediate_size

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
        if self.is_gated:
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
