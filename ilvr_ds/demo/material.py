"""The demo's material: a drawn task in the authors' format and a tiny random model with its tokenizer."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path

from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from ilvr_ds.data.decode import decode_image
from ilvr_ds.data.sample import Sample, TextStep
from ilvr_ds.demo.task import TaskSpec, draw_samples, write_task
from ilvr_ds.demo.task.drawing import CELL
from ilvr_ds.demo.tiny import MEDIUM, MINI, SMALL, TINY, build_tiny_model
from ilvr_ds.errors import UserError
from ilvr_ds.model.families import family_named

TOKENIZER_SAMPLES = 400
WHITENING_SAMPLES = 50
TRAINED = Path(__file__).parent / "trained"
"""A model of size mini after stage 1 on trails; its README says how it was made."""
TRAINED_ON = TaskSpec(operations=("trail",), signs=3, shuffled_options=False)
SIZES = {"tiny": TINY, "mini": MINI, "medium": MEDIUM, "small": SMALL}


def write_demo(
    output: Path,
    train: int,
    held_out: int,
    grid: int,
    size: str,
    seed: int,
    workers: int,
    operations: Sequence[str],
    signs: int | None,
    family: str,
) -> list[str]:
    """Write `output`/task (JSON Lines and images) and `output`/model; returns lines that say what was written.

    signs: of a trail. Raises UserError where a folder exists already, an operation or the family is unknown, a number
    is out of range, or the family cuts pictures of this grid elsewhere than between their cells.
    """
    spec = _task_spec(grid, tuple(operations), signs)
    _check_cells(grid, family)
    write_task(output / "task", spec, seed, train, held_out, workers)
    write_demo_model(output / "model", spec, size, seed, family)
    return _written(output, train, held_out, f"random, {size}")


def write_trained_demo(output: Path, train: int, held_out: int, seed: int, workers: int) -> list[str]:
    """The same with the model that comes with the package, and trails like those that it was trained on.

    Raises UserError where a folder exists already or a number is out of range.
    """
    if (output / "model").exists():
        raise UserError(f"{output / 'model'}: exists already; remove it or choose another folder")
    write_task(output / "task", TRAINED_ON, seed, train, held_out, workers)
    shutil.copytree(TRAINED, output / "model")
    return _written(output, train, held_out, "trained on trails of 3 signs")


def _written(output: Path, train: int, held_out: int, model: str) -> list[str]:
    samples = f"{output / 'task'}: {train} training and {held_out} held-out samples"
    return [samples, f"{output / 'model'}: a model, {model}"]


def _check_cells(grid: int, family: str) -> None:
    """A cell of a picture, CELL pixels wide, must become one merged patch of the family's tower."""
    images = Qwen2VLImageProcessorPil(**family_named(family).image_settings)
    cell, side = images.patch_size * images.merge_size, grid * CELL
    height, _ = smart_resize(side, side, cell, images.size["shortest_edge"], images.size["longest_edge"])
    if height != grid * cell:
        raise UserError(
            f"grid: {grid} cells of {CELL} pixels become {height // cell} merged patches of {cell} in a {family}; "
            "choose 4"
        )


def _task_spec(grid: int, operations: tuple[str, ...], signs: int | None) -> TaskSpec:
    """With a trail as many shapes and colours as there are cells a side, which it needs."""
    if "trail" in operations:
        length = TaskSpec.signs if signs is None else signs
        return TaskSpec(grid=grid, shapes=grid, colours=grid, operations=operations, signs=length)
    if signs is not None:
        raise UserError(f"signs: {signs}, but only a trail has signs; add --operations trail, or leave --signs out")
    return TaskSpec(grid=grid, operations=operations)


def write_demo_model(directory: Path, spec: TaskSpec, size: str, seed: int = 0, family: str = "qwen2_5_vl") -> None:
    """A random model whose tokenizer knows the words of the task, and whose tower knows its shaded pictures."""
    samples = list(islice(draw_samples(spec, seed, "train", TOKENIZER_SAMPLES), TOKENIZER_SAMPLES))
    texts = [text for sample in samples for text in _texts(sample)]
    shown: Iterable[bytes] = ()
    if "trail" in spec.operations:
        shown = (image for sample in samples[:WHITENING_SAMPLES] for image in sample.helper_images)
    elif spec.shaded:
        shown = (image for sample in samples for image in (*sample.input_images, *sample.helper_images))
    pictures = [decode_image(image) for image in shown]
    build_tiny_model(directory, texts=texts, size=SIZES[size], seed=seed, family=family, pictures=pictures)


def _texts(sample: Sample) -> list[str]:
    return [sample.question, *(step.content for step in sample.steps if isinstance(step, TextStep))]
