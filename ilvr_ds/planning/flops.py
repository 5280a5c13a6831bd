"""Model FLOPs of training: what the mathematics needs, whatever the implementation repeats or pads.

Per optimizer step (issue 7), P weights and T tokens without padding:

    6 P_trained T  +  4 P_frozen T  +  2 P_teacher T  +  2 P_vision patches  +  attention

A trained weight costs 2 in the forward and 4 in the backward; a frozen weight below adapters 2 and, for the gradient
that passes through it, 2 more. Vision counts where images go through the tower, not where features are stored.
Attention over n tokens costs 4 n^2 times the width of all heads a layer, half of that where it is causal, and the
backward twice the forward. Recomputation (activation checkpointing) does not count.

This counts all weights, as is usual, though an embedding is only looked up and this head only sees supervised tokens.
`matmul` counts what is really multiplied; it is what torch's FlopCounterMode finds.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from ilvr_ds.planning.geometry import Geometry


@dataclass(frozen=True)
class Work:
    """What there is to compute, on one rank, padding not counted."""

    samples: int = 0
    tokens: int = 0
    squares: int = 0
    """Sum over samples of the squared number of tokens"""
    labels: int = 0
    """Supervised tokens"""
    patches: int = 0
    """Of images that go through the tower"""
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
        """All of them."""
        return self.student + self.teacher + self.vision


@dataclass(frozen=True)
class ModelFlops:
    """Turns work into floating-point operations."""

    geometry: Geometry
    trained: int
    """Trained weights of the student"""
    frozen: int
    """Frozen weights of the student's language model and head: those below adapters"""
    has_teacher: bool

    def of(self, work: Work) -> Flops:
        """By the formula at the head of this file."""
        text, vision = self.geometry.text, self.geometry.vision
        attention = self._text_attention(work)
        return Flops(
            student=(6 * self.trained + 4 * self.frozen) * work.tokens + 3 * attention,
            teacher=self.has_teacher * (2 * text.language_model * work.tokens + attention),
            vision=2 * vision.total * work.patches + self._vision_attention(work),
        )

    def matmul(self, work: Work) -> Flops:
        """The same of what is multiplied: matrices alone, the head on supervised tokens, the merger on merged patches,
        no embedding table."""
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
        """One causal forward of all layers: half the square."""
        text = self.geometry.text
        return 2 * text.layers * text.heads * text.head_dim * work.squares

    def _vision_attention(self, work: Work) -> float:
        vision = self.geometry.vision
        full = vision.full_attention_blocks
        pairs = full * work.image_squares + (vision.depth - full) * work.window_squares
        return 4 * vision.hidden_size * pairs
