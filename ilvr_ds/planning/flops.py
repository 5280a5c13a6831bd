"""Model FLOPs of training: what the mathematics needs, whatever the implementation repeats or pads.

Per optimizer step, for P weights and T tokens without padding:

    6 P_trained T  +  4 P_frozen T  +  2 P_teacher T  +  2 P_vision patches  +  attention

A trained weight costs 2 in the forward and 4 in the backward; a frozen weight below adapters 2, and 2 more for the
gradient that passes through it. Vision counts where images go through the tower, not with stored features. Attention
over n tokens costs 4 n^2 times the width of all heads per layer, half of that if causal, and the backward twice the
forward. Recomputation (activation checkpointing) does not count.

By convention this counts all weights, though an embedding is only looked up and the head sees supervised tokens alone.
`matmul` counts the actual multiplications, those that torch's FlopCounterMode finds.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from ilvr_ds.model.sizes import Geometry


@dataclass(frozen=True)
class Work:
    """The work of one rank, without padding."""

    samples: int = 0
    tokens: int = 0
    squares: int = 0
    """Sum over samples of the squared number of tokens"""
    labels: int = 0
    """Supervised tokens"""
    patches: int = 0
    """Patches of images that go through the tower"""
    image_squares: int = 0
    """Sum over images of the squared number of patches"""
    window_squares: int = 0
    """Sum over the tower's attention windows of the squared number of patches"""

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))


@dataclass(frozen=True)
class Flops:
    """Floating-point operations by network."""

    student: float
    teacher: float
    vision: float

    @property
    def total(self) -> float:
        """The sum."""
        return self.student + self.teacher + self.vision


@dataclass(frozen=True)
class ModelFlops:
    """Converts work to floating-point operations."""

    geometry: Geometry
    trained: int
    """Trained weights of the student"""
    frozen: int
    """Frozen weights of the student's language model and head: those below adapters"""
    has_teacher: bool

    def of(self, work: Work) -> Flops:
        """By the formula at the top of this file."""
        text, vision = self.geometry.text, self.geometry.vision
        attention = self._text_attention(work)
        return Flops(
            student=(6 * self.trained + 4 * self.frozen) * work.tokens + 3 * attention,
            teacher=self.has_teacher * (2 * text.language_model * work.tokens + attention),
            vision=2 * vision.total * work.patches + self._vision_attention(work),
        )

    def matmul(self, work: Work) -> Flops:
        """Actual multiplications: matrices alone, the head on supervised tokens, the merger on merged patches."""
        text, vision = self.geometry.text, self.geometry.vision
        attention = self._text_attention(work)
        layers = 2 * text.layers * text.layer_matrices * work.tokens
        head = 2 * text.embedding * work.labels
        adapters = 2 * self.trained * work.tokens if self.frozen else 0
        passes = 2 if self.frozen else 3  # frozen matrices have no gradient of their own
        blocks = 2 * (vision.patch_inputs * vision.hidden_size + vision.depth * vision.block_matrices) * work.patches
        merger = 2 * vision.merger_matrices * (work.patches // vision.merge_size**2)
        return Flops(
            student=passes * (layers + head) + 3 * (adapters + attention),
            teacher=self.has_teacher * (layers + attention),
            vision=blocks + merger + self._vision_attention(work),
        )

    def _text_attention(self, work: Work) -> float:
        """One causal forward of all layers, half the square."""
        text = self.geometry.text
        return 2 * text.layers * text.heads * text.head_dim * work.squares

    def _vision_attention(self, work: Work) -> float:
        vision = self.geometry.vision
        full = vision.full_attention_blocks
        pairs = full * work.image_squares + (vision.depth - full) * work.window_squares
        return 4 * vision.hidden_size * pairs
