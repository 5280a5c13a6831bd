"""Encoded samples to a `Window`: rows, flat positions, pooling runs, rounds of segments.

The letters are those of `ilvr_ds.data.window`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from ilvr_ds.config import Compare, Pool
from ilvr_ds.data.candidates import CandidateLayout
from ilvr_ds.data.images import Grid, VisionLayout, attention_bookkeeping
from ilvr_ds.data.rollout import lay_out
from ilvr_ds.data.template import IGNORE, EncodedSample
from ilvr_ds.data.tokens import SpecialTokens
from ilvr_ds.data.window import ImageBatch, MicroBatch, QueryContext, Round, TokenBatch, Window

Int64 = NDArray[np.int64]
Bool = NDArray[np.bool_]
Rows = Literal["packed", "right", "left"]
"""All samples end to end in one row, or each in its own with padding on that side."""


class Collator:
    """Builds Windows. Rows, latent size, pooling and the tower's layout are fixed for a run.

    `types` names the kinds of task by which losses are split; samples of other kinds count in the whole only.
    With `free_latents` (stage 2) every micro-batch holds the layout in which the student makes its latents itself.
    set_starts [sets]: in a mixture, the number of the first sample of each data set, by which losses are split too.
    Without encoded helper images (SampleEncoder) the window has no segments.
    """

    def __init__(
        self,
        special: SpecialTokens,
        layout: VisionLayout,
        latent_size: int,
        group_size: int,
        rows: Rows,
        free_latents: bool = False,
        types: tuple[str, ...] = (),
        pool: Pool = "all",
        compare: Compare = "place",
        set_starts: Int64 | None = None,
    ) -> None:
        self.special = special
        self.layout = layout
        self.latent_size = latent_size
        self.rows = rows
        self.free_latents = free_latents
        self.set_starts = set_starts
        self.types = {name: number for number, name in enumerate(types)}
        self.merge_unit = layout.merge_size**2
        self.candidates = CandidateLayout(layout.merge_size, group_size, pool, compare)

    def __call__(self, samples: list[EncodedSample], numbers: Int64, sizes: Sequence[int]) -> Window:
        """The window of `samples`.

        numbers [W]: their numbers in the data set. sizes: samples of each micro-batch, which are successive.
        """
        groups = [range(start, stop) for start, stop in pairwise(np.cumsum([0, *sizes]).tolist())]
        assert groups[-1].stop == len(samples) == len(numbers)
        features = _stored_features(samples)
        if features is None:
            feature_starts, images = self._images(samples, groups)
        else:
            feature_starts, images = self._stored_starts(samples), ()
        rounds = max(map(_num_helpers, samples))
        order = [(i, m) for m in range(rounds) for i, s in enumerate(samples) if m < _num_helpers(s)]
        offsets, candidates = self.candidates(samples, order, feature_starts)
        everyone = self._tokens(samples, feature_starts)
        micro_batches = tuple(
            self._micro_batch(
                [samples[i] for i in group], group, order, offsets, numbers, feature_starts[group.start : group.stop]
            )
            for group in groups
        )
        real = sum(len(s.input_ids) for s in samples)
        computed = [m.rollout if m.rollout and self.rows != "packed" else m.tokens for m in micro_batches]
        return Window(
            images=images,
            tokens=everyone,
            context=self._context(samples, order, offsets),
            candidates=candidates,
            micro_batches=micro_batches,
            supervised=torch.tensor([sum(len(m.label_ids) for m in micro_batches)]),
            features=features,
            num_tokens=real,
            num_padding=sum(columns.real.numel() for columns in computed) - real,
        )

    def _images(
        self, samples: list[EncodedSample], groups: list[range]
    ) -> tuple[list[tuple[Int64, Int64]], tuple[ImageBatch, ...]]:
        """Per sample the first feature row of each input and of each helper image; the images per micro-batch."""
        starts: list[tuple[Int64, Int64]] = []
        batches: list[ImageBatch] = []
        next_row = 0
        for group in groups:
            members = [samples[i] for i in group]
            inputs = [(s, j) for s in members for j in range(s.num_input_images)]
            helpers = [(s, j) for s in members for j in range(s.num_input_images, len(s.grids))]
            grids = [s.grids[j] for s, j in inputs + helpers]
            patches = [s.patches[j] for s, j in inputs + helpers]
            if not grids:
                side = self.layout.merge_size
                grids = [(side, side)]
                patches = [np.full((side * side, 3 * self.layout.patch_size**2), 128, dtype=np.uint8)]
            rows = next_row + np.cumsum([0, *(h * w // self.merge_unit for h, w in grids)])
            next_row = int(rows[-1])
            of_inputs, of_helpers = rows[: len(inputs)], rows[len(inputs) : len(inputs) + len(helpers)]
            for s in members:
                count = s.num_input_images
                starts.append((of_inputs[:count], of_helpers[: len(s.grids) - count]))
                of_inputs, of_helpers = of_inputs[count:], of_helpers[len(s.grids) - count :]
            batches.append(
                ImageBatch(torch.from_numpy(np.concatenate(patches)), **attention_bookkeeping(grids, self.layout))
            )
        return starts, tuple(batches)

    def _stored_starts(self, samples: list[EncodedSample]) -> list[tuple[Int64, Int64]]:
        """Like _images, where features are stored: sample by sample, each with its images in order."""
        starts = []
        next_row = 0
        for s in samples:
            rows = next_row + np.cumsum([0, *map(self._merged, s.grids)])
            next_row = int(rows[-1])
            starts.append((rows[: s.num_input_images], rows[s.num_input_images : -1]))
        return starts

    def _tokens(self, samples: list[EncodedSample], starts: list[tuple[Int64, Int64]]) -> TokenBatch:
        shape, base = self._lay(samples)
        ids = np.full(shape[0] * shape[1], self.special.pad, dtype=np.int64)
        positions = np.zeros((3, len(ids)), dtype=np.int64)
        real = np.zeros(len(ids), dtype=bool)
        slots: list[Int64] = []
        rows: list[Int64] = []
        for first, sample, (inputs, _) in zip(base, samples, starts, strict=True):
            place = slice(first, first + len(sample.input_ids))
            ids[place] = sample.input_ids
            positions[:, place] = sample.position_ids
            real[place] = True
            slots.append(first + np.flatnonzero(sample.input_ids == self.special.image_pad))
            merged = map(self._merged, sample.grids)
            rows.extend(start + np.arange(count) for start, count in zip(inputs, merged, strict=False))
        is_packed = self.rows == "packed"
        return TokenBatch(
            input_ids=torch.from_numpy(ids.reshape(shape)),
            position_ids=torch.from_numpy(positions.reshape(3, *shape)),
            real=torch.from_numpy(real.reshape(shape)),
            image_slots=_join(slots),
            image_rows=_join(rows),
            right_padded=self.rows != "left" or bool(real.all()),
            cu_seqlens=torch.tensor([*base, len(ids)], dtype=torch.int32) if is_packed else None,
            lengths=tuple(len(s.input_ids) for s in samples),
            image_lengths=tuple(map(len, slots)),
        )

    def _lay(self, samples: list[EncodedSample]) -> tuple[tuple[int, int], list[int]]:
        """Shape (rows, tokens of a row), and the flat position of each sample's first token."""
        lengths = [len(s.input_ids) for s in samples]
        if self.rows == "packed":
            starts = np.cumsum([0, *lengths]).tolist()
            return (1, starts[-1]), starts[:-1]
        longest = max(lengths)
        before = [longest - length if self.rows == "left" else 0 for length in lengths]
        return (len(samples), longest), [row * longest + first for row, first in enumerate(before)]

    def _micro_batch(
        self,
        samples: list[EncodedSample],
        members: range,
        order: list[tuple[int, int]],
        offsets: Int64,
        numbers: Int64,
        starts: list[tuple[Int64, Int64]],
    ) -> MicroBatch:
        shape, base = self._lay(samples)
        supervised = [np.flatnonzero(s.labels != IGNORE) for s in samples]
        label_starts = np.cumsum([0, *map(len, supervised)])
        answers = [label_starts[b] + _inside(at, *samples[b].answer) for b, at in enumerate(supervised)]
        mine = [(w, i - members.start, m) for w, (i, m) in enumerate(order) if i in members]
        pads = [base[b] + samples[b].segments[m] + np.arange(self.latent_size) for _, b, m in mine]
        rows = [np.arange(offsets[w], offsets[w + 1]) for w, _, _ in mine]
        kinds = [self.types.get(sample.group, len(self.types)) for sample in samples]
        label_types = np.repeat(np.array(kinds, dtype=np.int64), [len(at) for at in supervised])
        return MicroBatch(
            tokens=self._tokens(samples, starts),
            label_rows=_join([start + at - 1 for start, at in zip(base, supervised, strict=True)]),
            label_ids=_join([s.labels[at] for s, at in zip(samples, supervised, strict=True)]),
            label_types=torch.from_numpy(label_types),
            supervised_by_type=torch.from_numpy(np.bincount(label_types, minlength=len(self.types) + 1)[:-1]),
            segments=torch.tensor([w for w, _, _ in mine], dtype=torch.int64),
            latent_slots=_join(pads).view(-1, self.latent_size),
            sample_of_segment=torch.tensor([b for _, b, _ in mine], dtype=torch.int64),
            candidate_rows=_join(rows),
            candidate_offsets=torch.from_numpy(np.cumsum([0, *map(len, rows)], dtype=np.int64)),
            noise_keys=torch.tensor([(int(numbers[members.start + b]), m) for _, b, m in mine], dtype=torch.int64).view(
                -1, 2
            ),
            answer_rows=_join(answers),
            answer_samples=_join([np.full(len(rows), b) for b, rows in enumerate(answers)]),
            has_answer=torch.tensor([len(rows) > 0 for rows in answers]),
            rollout=lay_out(samples, base, shape, self.latent_size, self.special.image_pad)
            if self.free_latents
            else None,
            **self._sets(
                numbers[members.start : members.stop], [len(at) for at in supervised], [b for _, b, _ in mine]
            ),
            groups=tuple(s.group for s in samples),
            ids=tuple(s.id for s in samples),
        )

    def _sets(self, numbers: Int64, labels: list[int], segments: list[int]) -> dict[str, torch.Tensor]:
        """The data set of each label and segment, where they are a mixture's.

        numbers [B]: the samples' numbers; labels [B]: how many each has; segments [M]: the sample of each.
        """
        if self.set_starts is None:
            return {}
        of_sample = np.searchsorted(self.set_starts, numbers, side="right") - 1
        of_label = np.repeat(of_sample, labels)
        return {
            "label_sets": torch.from_numpy(of_label),
            "segment_sets": torch.from_numpy(of_sample[np.array(segments, dtype=np.int64)]),
            "supervised_by_set": torch.from_numpy(np.bincount(of_label, minlength=len(self.set_starts))),
        }

    def _context(self, samples: list[EncodedSample], order: list[tuple[int, int]], offsets: Int64) -> QueryContext:
        _, base = self._lay(samples)
        is_text, prompts, images = [], [], []
        for start, sample in zip(base, samples, strict=True):
            is_image = sample.input_ids[: sample.assistant] == self.special.image_pad
            is_text.append(~np.isin(sample.input_ids, self.special.context_free))
            prompts.append(start + np.flatnonzero(~is_image & is_text[-1][: sample.assistant]))
            images.append(start + np.flatnonzero(is_image))
        steps = [base[i] + self._step_positions(samples[i], m, is_text[i]) for i, m in order]
        where = {segment: number for number, segment in enumerate(order)}
        previous = [where.get((i, m - 1), number) for number, (i, m) in enumerate(order)]
        prompt, prompt_mask = _rectangle(prompts)
        image, image_mask = _rectangle(images)
        step, step_mask = _rectangle(steps)
        return QueryContext(
            prompt=prompt,
            prompt_mask=prompt_mask,
            image=image,
            image_mask=image_mask,
            step=step,
            step_mask=step_mask,
            sample=torch.tensor([i for i, _ in order], dtype=torch.int64),
            previous=torch.tensor(previous, dtype=torch.int64),
            has_previous=torch.tensor([m > 0 for _, m in order], dtype=torch.bool),
            rounds=tuple(_rounds(order, offsets)),
        )

    def _step_positions(self, sample: EncodedSample, m: int, is_text: Bool) -> Int64:
        """The text of segment m: from the end of the segment before (or the assistant's opening) to latent_start."""
        first = sample.assistant if m == 0 else int(sample.segments[m - 1]) + self.latent_size
        last = int(sample.segments[m]) - 1
        return first + np.flatnonzero(is_text[first:last])

    def _merged(self, grid: Grid) -> int:
        return grid[0] * grid[1] // self.merge_unit


def _stored_features(samples: list[EncodedSample]) -> torch.Tensor | None:
    """[F, D] bfloat16: the stored features of all samples; None where images go to the tower instead."""
    rows = [sample.features for sample in samples if sample.features is not None]
    if len(rows) != len(samples):
        assert not rows, "features are stored for all samples or for none"
        return None
    return torch.from_numpy(np.concatenate(rows).view(np.int16)).view(torch.bfloat16)


_EMPTY: Int64 = np.empty(0, dtype=np.int64)


def _num_helpers(sample: EncodedSample) -> int:
    """Encoded helper images: one for each segment, or none."""
    return len(sample.grids) - sample.num_input_images


def _rounds(order: list[tuple[int, int]], offsets: Int64) -> Iterator[Round]:
    """Runs of equal segment number in `order`, with their candidates."""
    starts = [w for w, (_, m) in enumerate(order) if w == 0 or m != order[w - 1][1]]
    for start, stop in pairwise([*starts, len(order)]):
        yield Round(start, stop, int(offsets[start]), int(offsets[stop]))


def _inside(positions: Int64, first: int, last: int) -> Int64:
    """Indices of `positions` that lie in [first, last)."""
    return np.flatnonzero((positions >= first) & (positions < last))


def _join(parts: list[Int64]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([_EMPTY, *parts]).astype(np.int64))


def _rectangle(lists: list[Int64]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ragged index lists as a rectangle (filled with the flat position 0) and its mask; never of width 0."""
    width = max([1, *map(len, lists)])
    values = np.zeros((len(lists), width), dtype=np.int64)
    mask = np.zeros((len(lists), width), dtype=bool)
    for row, positions in enumerate(lists):
        values[row, : len(positions)] = positions
        mask[row, : len(positions)] = True
    return torch.from_numpy(values), torch.from_numpy(mask)
