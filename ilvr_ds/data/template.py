"""A sample as the model reads it: token ids, labels, positions, latent segments, image patches.

T tokens, M segments, K latent slots of a segment. Loader workers compute all of it on the CPU, so that the training
step never has to look at a token from Python.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ilvr_ds.data.answer_place import find_answer
from ilvr_ds.data.decode import decode_image, image_size
from ilvr_ds.data.features import Rows
from ilvr_ds.data.images import Grid, ImageEncoder
from ilvr_ds.data.sample import LatentStep, Region, Sample, SampleError, Step, TextStep, Turn
from ilvr_ds.data.tokens import LATENT_TOKENS, THOUGHT_TOKENS, SpecialTokens, opens_thought
from ilvr_ds.data.turns import prompt_turns

IGNORE = -100
REMEMBERED = 256
"""Texts whose tokens an encoder keeps: samples of small tasks often differ in their pictures alone."""
_VISION_TOKENS = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>")
"""What Qwen's tokenizer treats as special without listing it among its special tokens."""
Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class EncodedSample:
    """One sample in numbers."""

    id: str
    group: str
    input_ids: Int64
    """[T]"""
    labels: Int64
    """[T]: the token where it is supervised, else -100. Position t is predicted from position t-1."""
    position_ids: Int64
    """[3, T]: temporal, height and width positions (mRoPE)."""
    assistant: int
    """Position of the `<|im_start|>` that opens the assistant's last turn, which has the segments."""
    segments: Int64
    """[M]: position of the first latent pad of each segment."""
    answer: tuple[int, int]
    """First and one past the last position of the answer's tokens in the final text; equal where there is none."""
    patches: tuple[NDArray[np.uint8], ...]
    """Per image [patches, bytes of a patch]: the input images, then the helper images if they are encoded."""
    grids: tuple[Grid, ...]
    """Per image (height, width) in patches."""
    num_input_images: int
    features: Rows | None = None
    """[merged patches, D] bf16 as uint16: rows of all images where they are stored; then there are no `patches`."""
    regions: tuple[Region | None, ...] = ()
    """[M]: the part of each helper image that its step is about, in fractions of width and height; None where the data
    do not say it. Empty where helper images are not encoded."""

    def followed_by(self, tokens: Sequence[int]) -> EncodedSample:
        """The sample with more text behind it, and nothing supervised."""
        ids = np.concatenate([self.input_ids, np.array(tokens, dtype=np.int64)])
        after = self.position_ids[:, -1:] + 1 + np.arange(len(tokens))
        positions = np.concatenate([self.position_ids, after], axis=1)
        return replace(self, input_ids=ids, position_ids=positions, labels=np.full_like(ids, IGNORE))


class SampleEncoder:
    """Turns samples into EncodedSamples with one tokenizer, one image encoder and one latent size.

    Picklable, without random numbers: the same sample always gives the same numbers. `with_helpers`: helper images
    are encoded too (only a teacher looks at them). `with_pixels`: images are decoded to patches; without, features are
    stored and only the images' headers are read.
    """

    def __init__(
        self,
        tokenizer: Any,
        special: SpecialTokens,
        images: ImageEncoder,
        latent_size: int,
        max_tokens: int,
        with_helpers: bool = True,
        with_pixels: bool = True,
    ) -> None:
        self.tokenizer = tokenizer
        self.special = special
        self.images = images
        self.latent_size = latent_size
        self.max_tokens = max_tokens
        self.with_helpers = with_helpers
        self.with_pixels = with_pixels
        self.merge_size: int = images.processor.merge_size
        self._assistant_word = np.array(tokenizer("assistant", add_special_tokens=False)["input_ids"], dtype=np.int64)
        self._opens_thought = opens_thought(tokenizer)
        reserved = [*tokenizer.all_special_tokens, *LATENT_TOKENS, *_VISION_TOKENS]
        reserved += THOUGHT_TOKENS if self._opens_thought else ()
        self._reserved = re.compile("|".join(map(re.escape, reserved)))
        self._words = lru_cache(REMEMBERED)(self._encode_words)

    def __call__(self, sample: Sample) -> EncodedSample:
        """Encode one sample; raises SampleError where it is too long or holds reserved tokens as text."""
        files = (*sample.input_images, *(sample.helper_images if self.with_helpers else ()))
        sizes = [image_size(data) for data in files]
        grids = self._grids(sizes, len(sample.input_images))
        patches = tuple(patches for patches, _ in self.images(files)) if self.with_pixels else ()
        steps = tuple(LatentStep(step.helper) if isinstance(step, LatentStep) else step for step in sample.steps)
        words = self._words(sample.question, sample.history, steps, sample.answer, grids[: len(sample.input_images)])
        if len(words.input_ids) > self.max_tokens:
            raise SampleError(f"{len(words.input_ids)} tokens, data.max_tokens allows {self.max_tokens}")
        regions = _regions(sample, sizes[len(sample.input_images) :])
        return replace(words, id=sample.id, group=sample.group, patches=patches, grids=grids, regions=regions)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_words"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._words = lru_cache(REMEMBERED)(self._encode_words)

    def _encode_words(
        self, question: str, history: tuple[Turn, ...], steps: tuple[Step, ...], answer: str, grids: tuple[Grid, ...]
    ) -> EncodedSample:
        """A sample of this text, steps without regions, and input images of these grids, but without name and images.

        Its arrays are shared by all samples with this text, and read-only.
        """
        sample = Sample("", question, steps, (b"",) * len(grids), answer=answer, history=history)
        ids, span = self._tokens(sample, list(grids))
        words = EncodedSample(
            id="",
            group="",
            input_ids=ids,
            labels=self._labels(ids),
            position_ids=self.positions(ids, list(grids)),
            assistant=self._assistant(ids),
            segments=np.flatnonzero(ids == self.special.latent_start) + 1,
            answer=span,
            patches=(),
            grids=(),
            num_input_images=len(grids),
        )
        for array in (words.input_ids, words.labels, words.position_ids, words.segments):
            array.flags.writeable = False
        return words

    def seeing_helpers(self) -> SampleEncoder:
        """A copy that encodes helper images too."""
        other = copy(self)
        other.with_helpers = True
        return other

    def stand_in(self, name: str) -> EncodedSample:
        """What is trained on in place of a bad sample: a question without image, segment or label.

        Its form is fixed, so that a rank makes the same calls, and it adds nothing to any loss.
        """
        ids, _ = self._tokens(Sample(name, "?", steps=()), [])
        empty = np.empty(0, dtype=np.int64)
        return EncodedSample(
            id=name,
            group="",
            input_ids=ids,
            labels=np.full_like(ids, IGNORE),
            position_ids=self.positions(ids, []),
            assistant=self._assistant(ids),
            segments=empty,
            answer=(0, 0),
            patches=(),
            grids=(),
            num_input_images=0,
        )

    def prompt(self, sample: Sample) -> EncodedSample:
        """What precedes an answer: the chat prompt and the input images, without steps, helper images and labels."""
        self._check_prompt(sample)
        encoded = self.images(sample.input_images)
        grids = [grid for _, grid in encoded]
        tokens = self.tokenizer(self.prompt_text(sample), add_special_tokens=False)["input_ids"]
        ids, _ = self._spread(tokens, grids)
        if len(ids) > self.max_tokens:
            raise SampleError(f"the prompt has {len(ids)} tokens, {self.max_tokens} are allowed")
        return EncodedSample(
            id=sample.id,
            group=sample.group,
            input_ids=ids,
            labels=np.full_like(ids, IGNORE),
            position_ids=self.positions(ids, grids),
            assistant=self._assistant(ids),
            segments=np.empty(0, dtype=np.int64),
            answer=(0, 0),
            patches=tuple(patches for patches, _ in encoded),
            grids=tuple(grids),
            num_input_images=len(grids),
        )

    def count_tokens(self, sample: Sample) -> int:
        """Length of the encoded sample in tokens, without cutting images into patches (used when packing)."""
        inputs = [decode_image(data).size for data in sample.input_images]
        helpers = [image_size(data) for data in sample.helper_images]  # they are no tokens, but must have a grid
        grids = self._grids([*inputs, *helpers], len(inputs))
        return len(self._tokens(sample, list(grids[: len(inputs)]))[0])

    def _grids(self, sizes: list[tuple[int, int]], inputs: int) -> tuple[Grid, ...]:
        """Grids of images by width and height, of which `inputs` are input images; an error says which one it is."""
        grids = []
        for number, size in enumerate(sizes):
            try:
                grids.append(self.images.grid_of_size(size))
            except SampleError as error:
                name = f"input image {number + 1}" if number < inputs else f"helper image {number - inputs + 1}"
                raise SampleError(f"{name}: {error}") from error
        return tuple(grids)

    def prompt_text(self, sample: Sample) -> str:
        """The chat prompt up to and including the assistant's opening, one image token per image."""
        return str(self.tokenizer.apply_chat_template(prompt_turns(sample), tokenize=False, add_generation_prompt=True))

    def _tokens(self, sample: Sample, grids: list[Grid]) -> tuple[Int64, tuple[int, int]]:
        """Ids with image and latent tokens spread out, and the span of the answer."""
        self._check_prompt(sample)
        self._check_text("".join(step.content if isinstance(step, TextStep) else "\n" for step in sample.steps))
        steps = self._step_texts(sample)
        turns = [*prompt_turns(sample), self._answer_turn(sample, steps)]
        text = self.tokenizer.apply_chat_template(turns, tokenize=False)
        encoded = self.tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
        ids, starts = self._spread(encoded["input_ids"], grids)
        first, last = _answer_span(text, sample, steps, encoded["offset_mapping"])
        return ids, (int(starts[first]), int(starts[last]))

    def _answer_turn(self, sample: Sample, steps: list[str]) -> dict[str, str]:
        """The steps as the assistant's message. Where its prompt opens a thought, all before the last text are one."""
        if not self._opens_thought:
            return {"role": "assistant", "content": "".join(steps)}
        last = _last_text(sample)
        return {"role": "assistant", "reasoning_content": "".join(steps[:last]), "content": "".join(steps[last:])}

    def _check_prompt(self, sample: Sample) -> None:
        for text in (sample.question, *(turn.text for turn in sample.history)):
            self._check_text(text)

    def _check_text(self, text: str) -> None:
        if found := self._reserved.search(text):
            raise SampleError(f"the text holds the reserved token {found[0]}")

    def _spread(self, tokens: list[int], grids: list[Grid]) -> tuple[Int64, Int64]:
        """Ids with each image token repeated for the image's merged patches, and where each of `tokens` then starts."""
        ids = np.asarray(tokens, dtype=np.int64)
        repeats = np.ones(len(ids), dtype=np.int64)
        slots = np.flatnonzero(ids == self.special.image_pad)
        if len(slots) != len(grids):
            raise SampleError(f"the chat template made {len(slots)} image slots for {len(grids)} images")
        repeats[slots] = [h * w // self.merge_size**2 for h, w in grids]
        return np.repeat(ids, repeats), np.concatenate([[0], np.cumsum(repeats)])

    def _step_texts(self, sample: Sample) -> list[str]:
        latent = "<|latent_start|>" + "<|latent_pad|>" * self.latent_size + "<|latent_end|>"
        return [latent if isinstance(step, LatentStep) else step.content for step in sample.steps]

    def _assistant(self, ids: Int64) -> int:
        turns: Int64 = np.flatnonzero(ids == self.special.im_start)
        return int(turns[-1])

    def _labels(self, ids: Int64) -> Int64:
        """Each of the assistant's turns behind `<|im_start|>assistant`, up to the next turn; -100 elsewhere and on
        latent pads.

        No text can open a turn: reserved tokens in it are refused.
        """
        labels = np.full_like(ids, IGNORE)
        turns = np.flatnonzero(ids == self.special.im_start).tolist()
        for start, end in pairwise([*turns, len(ids)]):
            first = start + 1 + len(self._assistant_word)
            if np.array_equal(ids[start + 1 : first], self._assistant_word):
                labels[first:end] = ids[first:end]
        labels[ids == self.special.latent_pad] = IGNORE
        return labels

    def positions(self, ids: Int64, grids: list[Grid]) -> Int64:
        """mRoPE positions: an image's tokens lie on its grid, text goes on one past the largest coordinate."""
        positions = np.empty((3, len(ids)), dtype=np.int64)
        images = np.flatnonzero(ids == self.special.image_pad)
        token = following = taken = 0
        for height, width in ((h // self.merge_size, w // self.merge_size) for h, w in grids):
            start, count = int(images[taken]), height * width
            positions[:, token:start] = np.arange(following, following + start - token)
            following += start - token
            rows, columns = np.divmod(np.arange(count), width)
            positions[:, start : start + count] = following + np.stack([np.zeros_like(rows), rows, columns])
            following += max(height, width)
            token, taken = start + count, taken + count
        positions[:, token:] = np.arange(following, following + len(ids) - token)
        return positions


def _regions(sample: Sample, sizes: list[tuple[int, int]]) -> tuple[Region | None, ...]:
    """The regions of the latent steps in fractions of their helper images, whose width and height are `sizes`."""
    latents = (step for step in sample.steps if isinstance(step, LatentStep))
    return tuple(step.region and _fractions(step.region, *size) for size, step in zip(sizes, latents, strict=False))


def _fractions(region: Region, width: int, height: int) -> Region:
    left, top, right, bottom = region
    return left / width, top / height, right / width, bottom / height


def _answer_span(text: str, sample: Sample, steps: list[str], offsets: list[tuple[int, int]]) -> tuple[int, int]:
    """Tokens [first, last) that overlap the answer as the final text step gives it; (0, 0) if none."""
    last = _last_text(sample)
    start, end = find_answer(steps[last], sample.answer) if last < len(steps) else (-1, -1)
    if start < 0:
        return 0, 0
    step = text.rindex("<|im_end|>") - len("".join(steps[last:]))
    tokens = [i for i, (a, b) in enumerate(offsets) if a < step + end and b > step + start]
    return tokens[0], tokens[-1] + 1


def _last_text(sample: Sample) -> int:
    """The number of the last text step; that of steps if there is none."""
    return max((i for i, step in enumerate(sample.steps) if isinstance(step, TextStep)), default=len(sample.steps))
