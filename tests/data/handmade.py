"""Encoded samples and windows without a tokenizer: every number can be read off the test."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ilvr_ds.config import Compare, Pool
from ilvr_ds.data.collate import Collator, Rows
from ilvr_ds.data.images import Grid, VisionLayout
from ilvr_ds.data.template import IGNORE, EncodedSample
from ilvr_ds.data.tensor_tree import TensorTree
from ilvr_ds.data.tokens import SpecialTokens
from ilvr_ds.data.window import ImageBatch, Window

PAD, START, END, OPEN, CLOSE, VISION_START, VISION_END, IMAGE, FILL = range(1, 10)
SPECIAL = SpecialTokens(
    latent_pad=PAD,
    latent_start=START,
    latent_end=END,
    im_start=OPEN,
    im_end=CLOSE,
    vision_start=VISION_START,
    vision_end=VISION_END,
    image_pad=IMAGE,
    pad=FILL,
)
LAYOUT = VisionLayout(patch_size=14, merge_size=2, window_size=112)
K = 2
ASSISTANT = 99  # the token of the word "assistant"


def encoded_sample(
    name: int, inputs: tuple[Grid, ...] = (), helpers: tuple[Grid, ...] = (), question: int = 1, answer: bool = True
) -> EncodedSample:
    """`question` question tokens; before segment m, m + 1 tokens of text; two tokens of answer.

    Text tokens are 1000 * (name + 1) + position, so that each is unique. Input images stand at the front.
    The first byte of a patch names the image (10 * name + number), the second the merged patch it belongs to.
    """
    ids: list[int] = [OPEN]

    def text(count: int) -> None:
        start = 1000 * (name + 1) + len(ids)
        ids.extend(range(start, start + count))

    for height, width in inputs:
        ids += [VISION_START, *[IMAGE] * (height * width // 4), VISION_END]
    text(question)
    ids += [CLOSE]
    assistant = len(ids)
    ids += [OPEN, ASSISTANT]
    segments = []
    for m in range(len(helpers)):
        text(m + 1)
        segments.append(len(ids) + 1)
        ids += [START, *[PAD] * K, END]
    span = (len(ids), len(ids) + 2 * answer)
    text(2)
    ids += [CLOSE]
    tokens = np.array(ids)
    labels = np.where((np.arange(len(ids)) < assistant + 2) | (tokens == PAD), IGNORE, tokens)
    grids = (*inputs, *helpers)
    return EncodedSample(
        id=f"id-{name}",
        group=("even", "odd")[name % 2],
        input_ids=tokens,
        labels=labels,
        position_ids=np.arange(len(ids)) + 1 + 100 * np.arange(3)[:, None],
        assistant=assistant,
        segments=np.array(segments, dtype=np.int64),
        answer=span,
        patches=tuple(_patches(10 * name + j, grid) for j, grid in enumerate(grids)),
        grids=grids,
        num_input_images=len(inputs),
    )


def _patches(image: int, grid: Grid) -> np.ndarray:
    patches = np.zeros((grid[0] * grid[1], 3 * 14 * 14), dtype=np.uint8)
    patches[:, 0], patches[:, 1] = image, np.arange(len(patches)) // 4
    return patches


def window_of(
    samples: list[EncodedSample],
    micro: int,
    rows: Rows = "right",
    group_size: int = 4,
    pool: Pool = "all",
    compare: Compare = "place",
) -> Window:
    """The window; sample i has number 50 + i in the data set."""
    sizes = [micro] * (len(samples) // micro)
    collator = Collator(SPECIAL, LAYOUT, K, group_size, rows, pool=pool, compare=compare)
    return collator(samples, 50 + np.arange(len(samples)), sizes)


class Pairs:
    """Sample numbers in stored order, two micro-batches of two samples a step."""

    def __call__(self, step: int) -> list[np.ndarray]:
        return [np.array([first, first + 1]) for first in (4 * step, 4 * step + 2)]


def feature_names(images: tuple[ImageBatch, ...]) -> list[tuple[int, int]]:
    """(image, merged patch) of each row of a window's features, read from the bytes that go to the tower."""
    return [(int(p[0]), int(p[1])) for batch in images for p in batch.patches[::4]]


def flat(tokens: torch.Tensor, positions: torch.Tensor) -> list[int]:
    """The tokens at flat positions."""
    return tokens.flatten()[positions.flatten()].tolist()


def leaves(tree: Any, name: str = "window") -> list[tuple[str, torch.Tensor]]:
    """All tensors of a window with the names of their fields."""
    if isinstance(tree, torch.Tensor):
        return [(name.rpartition(".")[2], tree)]
    if isinstance(tree, TensorTree):
        return [leaf for key, value in vars(tree).items() for leaf in leaves(value, f"{name}.{key}")]
    if isinstance(tree, tuple):
        return [leaf for item in tree for leaf in leaves(item, name)]
    return []
