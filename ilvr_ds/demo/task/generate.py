"""Samples of the demo task, each a pure function of (spec, seed, index, split).

By construction no text tells its answer: the words are drawn first, then the right letter, uniformly and without regard
to the words, then pictures that fit both. Words and letter are therefore exactly independent, and the rationale says of
the pictures only what is as likely with any other letter.

A hash of words and input picture assigns a sample's content to a split. Where it is the other split, the picture is
drawn again, with the same words and letter: no content is in both splits, and the letter stays uniform.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Literal, get_args

import numpy as np

from ilvr_ds.data.sample import LatentStep, Region, Sample, Step, TextStep
from ilvr_ds.demo.task.creation import Creation
from ilvr_ds.demo.task.deletion import Deletion
from ilvr_ds.demo.task.drawing import CELL, encode_scene
from ilvr_ds.demo.task.look import Look
from ilvr_ds.demo.task.scene import Scene
from ilvr_ds.demo.task.selection import Selection
from ilvr_ds.demo.task.spec import TaskSpec
from ilvr_ds.demo.task.trail import Trail
from ilvr_ds.demo.task.update import Update
from ilvr_ds.demo.task.words import LETTERS, Words
from ilvr_ds.errors import UserError, nearest

Split = Literal["train", "held_out"]
SPLITS: tuple[Split, ...] = get_args(Split)


def draw_samples(spec: TaskSpec, seed: int, split: Split, count: int, start: int = 0) -> Iterator[Sample]:
    """Samples number `start` to `start + count` - 1 of a split, the operations in turn."""
    return (draw_sample(spec, seed, index, split) for index in range(start, start + count))


def draw_sample(spec: TaskSpec, seed: int, index: int, split: Split) -> Sample:
    """Sample number `index` of a split; its group is the operation, its answer the letter, its images PNG files.

    A caption has no answer: its text is its last step.
    Raises UserError for a negative seed and an unknown split.
    """
    if split not in SPLITS:
        raise UserError(f"split: '{split}' is unknown{nearest(split, SPLITS)}")
    if seed < 0:
        raise UserError(f"seed: {seed} is negative; choose 0 or more")
    rng = np.random.Generator(np.random.PCG64((seed, index, SPLITS.index(split))))
    operation = spec.operations[index % len(spec.operations)]
    words = _draw_words(operation, rng, spec)
    right = int(rng.integers(len(LETTERS)))
    scenes = words.scenes(rng, right)
    while split_of(words, scenes[0]) != split:
        scenes = words.scenes(rng, right)
    given, *helpers = (encode_scene(scene) for scene in scenes)
    return Sample(
        id=f"{split}-{seed}-{index:07d}",
        question=words.question,
        steps=_steps(words, scenes, right),
        input_images=(given,),
        helper_images=tuple(helpers),
        answer=LETTERS[right] if words.options else "",
        group=operation,
    )


def split_of(words: Words, scene: Scene) -> Split:
    """The split to which a question about a picture belongs, by one bit of a hash of both."""
    content = f"{words.question}\n{scene.describe()}"
    return SPLITS[hashlib.sha256(content.encode()).digest()[0] & 1]


def _draw_words(operation: str, rng: np.random.Generator, spec: TaskSpec) -> Words:
    if operation == "creation":
        return Creation.draw(rng, spec)
    if operation == "deletion":
        return Deletion.draw(rng, spec)
    if operation == "update":
        return Update.draw(rng, spec)
    if operation == "trail":
        return Trail.draw(rng, spec)
    if operation == "look":
        return Look.draw(rng, spec)
    return Selection.draw(rng, spec)


def _steps(words: Words, scenes: list[Scene], right: int) -> tuple[Step, ...]:
    steps: list[Step] = []
    for number, text in enumerate(words.rationale(scenes)):
        steps.append(TextStep(text))
        if number + 1 < len(scenes):
            steps.append(LatentStep(number, _marked_box(scenes[number + 1]) if isinstance(words, Trail) else None))
    if not words.options:
        return tuple(steps)
    return (*steps, TextStep(f"The final answer is: {LETTERS[right]}) {words.options[right]}"))


def _marked_box(scene: Scene) -> Region | None:
    """The marked cell in pixels: the pictures of a trail are about nothing else."""
    if scene.marked is None:
        return None
    row, column = scene.marked
    return float(column * CELL), float(row * CELL), float((column + 1) * CELL), float((row + 1) * CELL)
