"""What one rank needs for one optimizer step, as tensors: the `Window` and its parts.

Letters: W samples of the window, R rows of T tokens (one row a sample, padded to the longest; or one row in which
the samples lie end to end), B samples of a micro-batch, M segments, K latent slots, N candidates, F rows of merged
image features, L supervised tokens. A *flat position* is r * T + t.

The loader computes every index that the step needs on the CPU: between batch and optimizer step Python never waits for
something to be counted, searched or masked on the device.

Segments of a window are ordered by rounds: the first segments of all samples, then all second ones, and so on. A round
depends only on earlier rounds, so that selection is one launch per round.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from ilvr_ds.data.rollout import RolloutLayout
from ilvr_ds.data.tensor_tree import TensorTree


@dataclass(frozen=True)
class ImageBatch(TensorTree):
    """Images of one micro-batch for one call of the vision tower: its input images, then its helper images.

    A micro-batch without images holds one tiny grey image that nothing refers to: the tower is called all the same.
    Beside the patches are arguments of the stock tower, by its names; None where it has no such argument.
    """

    patches: torch.Tensor
    """[patches, bytes of a patch] uint8"""
    position_ids: torch.Tensor
    """[patches, 2] int64"""
    cu_seqlens: torch.Tensor = field(metadata={"host": True})
    """[images + 1] int32 on the CPU: PyTorch's attention needs the lengths as Python numbers"""
    window_index: torch.Tensor | None = None
    """[merged patches] int64"""
    cu_window_seqlens: torch.Tensor | None = field(default=None, metadata={"host": True})
    """[attention windows + 1] int32 on the CPU"""
    interp_indices: torch.Tensor | None = None
    """[patches, 4] int32: the learnt positions of which each patch has a mixture"""
    interp_weights: torch.Tensor | None = None
    """[patches, 4] float32"""

    def named(self, *names: str) -> dict[str, torch.Tensor]:
        """Those of these arguments that there are."""
        return {name: tensor for name in names if (tensor := getattr(self, name)) is not None}


@dataclass(frozen=True)
class TokenBatch(TensorTree):
    """Token sequences of a micro-batch or a window: a row each, padded to the longest, or all end to end in one."""

    input_ids: torch.Tensor
    """[R, T] int64"""
    position_ids: torch.Tensor
    """[3, R, T] int64; each sample counts from its own start"""
    real: torch.Tensor
    """[R, T] bool: False on padding"""
    image_slots: torch.Tensor
    """[image tokens] int64 flat positions of image tokens"""
    image_rows: torch.Tensor
    """[image tokens] int64: the row of the window's features [F, D] that goes there"""
    right_padded: bool = True
    """Padding, if any, follows the text, so that a causal model needs no attention mask."""
    cu_seqlens: torch.Tensor | None = None
    """[samples + 1] int32: where the samples begin in the one row that holds them end to end; None: a row each."""
    lengths: tuple[int, ...] = ()
    """Tokens of each sample."""
    image_lengths: tuple[int, ...] = ()
    """Image tokens of each sample."""

    def places(self, samples: range) -> tuple[slice, slice]:
        """Rows and columns in which successive `samples` lie."""
        if self.cu_seqlens is None:
            return slice(samples.start, samples.stop), slice(None)
        first = sum(self.lengths[: samples.start])
        return slice(None), slice(first, first + sum(self.lengths[samples.start : samples.stop]))

    def of(self, samples: range) -> TokenBatch:
        """Successive `samples` alone."""
        rows, columns = self.places(samples)
        starts = self.cu_seqlens
        first = sum(self.image_lengths[: samples.start])
        images = slice(first, first + sum(self.image_lengths[samples.start : samples.stop]))
        before = self.input_ids.shape[1] * (rows.start or 0) + (columns.start or 0)
        return TokenBatch(
            input_ids=self.input_ids[rows, columns],
            position_ids=self.position_ids[:, rows, columns],
            real=self.real[rows, columns],
            image_slots=self.image_slots[images] - before,
            image_rows=self.image_rows[images],
            right_padded=self.right_padded,
            cu_seqlens=None if starts is None else starts[samples.start : samples.stop + 1] - starts[samples.start],
            lengths=self.lengths[samples.start : samples.stop],
            image_lengths=self.image_lengths[samples.start : samples.stop],
        )


class Search(NamedTuple):
    """Candidates [first, last) that are not compared place by place, because the picture before has another grid or
    because of `selection.compare: nearest`, but with the rows `Before.earlier[start:stop]`: all earlier pictures of
    the sample."""

    first: int
    last: int
    start: int
    stop: int


@dataclass(frozen=True)
class Before(TensorTree):
    """The pictures before each helper image, as rows of the *earlier table* [E, D]: the window's candidates, and behind
    them the input images, pooled alike."""

    input_rows: torch.Tensor
    """[E - N, R'] int64 rows of the window's features that are averaged, as in Candidates"""
    input_weights: torch.Tensor
    """[E - N, R'] float32"""
    place: torch.Tensor
    """[N, B] int64: rows at a candidate's place in the helper image before, or for a first one in the input images of
    its grid; the last is repeated where there are fewer than B. The candidate itself where no such picture exists."""
    earlier: torch.Tensor
    """[Y] int64"""
    searches: tuple[Search, ...] = ()


@dataclass(frozen=True)
class Candidates(TensorTree):
    """Where the candidate features of the window's segments come from (helper images, pooled)."""

    rows: torch.Tensor
    """[N, R] int64 rows of the window's features [F, D] that are averaged to one candidate"""
    weights: torch.Tensor
    """[N, R] float32: 1 / run length, 0 where a run is shorter than R"""
    offsets: torch.Tensor
    """[M + 1] int64: candidates of segment m are rows offsets[m] to offsets[m + 1]"""
    before: Before | None = None
    """With `selection.pool: changed`"""
    in_region: torch.Tensor | None = None
    """[N] bool, with `selection.pool: region`: the candidate lies in the region of its segment"""


class Round(NamedTuple):
    """Segments [start, stop) that depend only on earlier rounds, and their candidates [first, last)."""

    start: int
    stop: int
    first: int
    last: int


@dataclass(frozen=True)
class QueryContext(TensorTree):
    """Positions that the teacher averages for its queries, padded to rectangles with masks."""

    prompt: torch.Tensor
    """[W, R] int64 flat positions of prompt tokens"""
    prompt_mask: torch.Tensor
    """[W, R] bool"""
    image: torch.Tensor
    """[W, I] int64 flat positions of input-image tokens"""
    image_mask: torch.Tensor
    """[W, I] bool"""
    step: torch.Tensor
    """[M, S] int64 flat positions of the text before each segment"""
    step_mask: torch.Tensor
    """[M, S] bool"""
    sample: torch.Tensor
    """[M] int64: the sample of each segment"""
    previous: torch.Tensor
    """[M] int64: the segment before it in the same sample; its own number where there is none"""
    has_previous: torch.Tensor
    """[M] bool"""
    rounds: tuple[Round, ...] = ()

    def of(self, samples: range) -> QueryContext:
        """The context with prompts and images of successive `samples` alone."""
        rows = slice(samples.start, samples.stop)
        return replace(
            self,
            prompt=self.prompt[rows],
            prompt_mask=self.prompt_mask[rows],
            image=self.image[rows],
            image_mask=self.image_mask[rows],
        )


@dataclass(frozen=True)
class MicroBatch(TensorTree):
    """One forward and backward of the student."""

    tokens: TokenBatch
    label_rows: torch.Tensor
    """[L] int64 flat positions t-1 whose hidden state predicts a supervised token"""
    label_ids: torch.Tensor
    """[L] int64 the tokens"""
    label_types: torch.Tensor
    """[L] int64 kind of task of the sample, as an index of the collator's `types`; one past the last: another kind"""
    supervised_by_type: torch.Tensor
    """[types] int64 how many labels each kind of task has"""
    segments: torch.Tensor
    """[M] int64: the micro-batch's segments, as numbers in the window"""
    latent_slots: torch.Tensor
    """[M, K] int64 flat positions of latent pads"""
    sample_of_segment: torch.Tensor
    """[M] int64: row of the sample in the micro-batch"""
    candidate_rows: torch.Tensor
    """[N] int64: the micro-batch's candidates, as rows of the window's"""
    candidate_offsets: torch.Tensor
    """[M + 1] int64"""
    noise_keys: torch.Tensor
    """[M, 2] int64: number of the sample in the data, number of the segment in the sample"""
    answer_rows: torch.Tensor
    """[A] int64: rows of the labels (0..L-1) that belong to answers"""
    answer_samples: torch.Tensor
    """[A] int64: row of the sample in the micro-batch"""
    has_answer: torch.Tensor
    """[B] bool"""
    rollout: RolloutLayout | None = None
    """Stage 2 only; M is 0 above there unless helper images are read, for a teacher or to look at them."""
    label_sets: torch.Tensor | None = None
    """[L] int64, in a mixture: the data set of each label's sample"""
    segment_sets: torch.Tensor | None = None
    """[M] int64, in a mixture: the data set of each segment's sample"""
    supervised_by_set: torch.Tensor | None = None
    """[sets] int64, in a mixture: how many labels each data set has"""
    groups: tuple[str, ...] = ()
    """Kind of task of each sample."""
    ids: tuple[str, ...] = ()
    """Id of each sample, for messages."""


@dataclass(frozen=True)
class BadSample:
    """A sample that could not be read, decoded or encoded; a stand-in is trained on instead."""

    number: int
    """In the data set."""
    id: str
    """"" where the sample could not be read."""
    shard: str
    offset: int
    """First byte of the sample in its shard."""
    reason: str


@dataclass(frozen=True)
class Window(TensorTree):
    """Everything that one rank needs for one optimizer step."""

    images: tuple[ImageBatch, ...]
    """One per micro-batch, or none where `features` are stored. Their merged features, one after the other, are the
    window's."""
    tokens: TokenBatch
    """All samples of the window: what the teacher reads."""
    context: QueryContext
    candidates: Candidates
    micro_batches: tuple[MicroBatch, ...]
    supervised: torch.Tensor
    """[1] int64 supervised tokens of the window on this rank"""
    features: torch.Tensor | None = None
    """[F, D] bfloat16: the window's features where they are stored with the data."""
    num_tokens: int = 0
    num_padding: int = 0
    bad: tuple[BadSample, ...] = ()
    """Samples of the window that are stand-ins."""
    retries: int = 0
    """Reads that were repeated for this window."""

    @property
    def ids(self) -> tuple[str, ...]:
        """Id of each sample, for messages."""
        return tuple(name for micro in self.micro_batches for name in micro.ids)
