"""The data of tests/bench/latents.py: drawn and packed in every form, with their vision features stored.

A trail's data are named by its number of signs, those of the four operations `operations`.
"""

from __future__ import annotations

import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from multiprocessing import get_context, set_start_method
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ilvr_ds import dist
from ilvr_ds.config import ModelConfig
from ilvr_ds.data.reader import ShardReader
from ilvr_ds.data.sample import LatentStep, Sample, TextStep
from ilvr_ds.data.shards import open_dataset
from ilvr_ds.demo.material import write_demo_model
from ilvr_ds.demo.task import OPERATIONS, TaskSpec, draw_samples
from ilvr_ds.demo.task.drawing import CELL
from ilvr_ds.demo.task.generate import Split
from ilvr_ds.file_modes import follow_umask
from ilvr_ds.ingest.pack import pack_samples
from ilvr_ds.model.feature_pass import EncodeSettings, encode
from ilvr_ds.model.student import load_config, load_student, vision_layout

CHUNK = 256
FOUR = "operations"
DRAWN = ("named", "look")
"""Forms that are samples of their own, and no other way to say the same samples."""


def spec_of(form: str, task: str) -> TaskSpec:
    """What is drawn. Options are in a fixed order, and pictures are shaded: else no target says where it is."""
    if task == FOUR:
        operations = ("look",) if form == "look" else OPERATIONS
        return TaskSpec(operations=operations, shaded=True, shuffled_options=False)
    return TaskSpec(operations=("trail",), signs=int(task), named=form == "named", shuffled_options=False)


def model_spec(task: str) -> TaskSpec:
    """What the model's words and tower are made from."""
    if task == FOUR:
        return replace(spec_of("latent", task), operations=(*OPERATIONS, "look"))
    return TaskSpec(operations=("trail",), signs=int(task), named=True)


def prepare(options: Any, task: str, forms: set[str]) -> None:
    """Models, shards and stored features, where they are not there yet."""
    write_models(options, task)
    drawn, derived = sorted(forms & set(DRAWN)), sorted(forms - {"latent", *DRAWN})
    splits: tuple[tuple[Split, int], ...] = (("train", options.samples), ("held_out", options.held_out))
    context = get_context("forkserver")  # a fork of this process, which has threads, can hang
    context.set_forkserver_preload([__name__])
    default = {"initializer": set_start_method, "initargs": (None, True)}  # for loader workers, else of this context
    with ThreadPoolExecutor() as threads, ProcessPoolExecutor(options.draw_workers, context, **default) as pool:
        waiting = [threads.submit(_prepare_split, options, pool, task, derived, drawn, *split) for split in splits]
        for job in waiting:
            job.result()


def model_folder(options: Any, task: str, seed: int) -> Path:
    """Where the model of a seed lies."""
    path: Path = options.output / (f"model-{task}-s{seed}" if seed else f"model-{task}")
    return path


def write_models(options: Any, task: str) -> None:
    """A model for seed 0 and for each seed of the options; they have the tower in common, as stored features must."""
    first = model_folder(options, task, 0)
    if not first.exists():
        write_demo_model(first, model_spec(task), options.size, family=options.family)
    for seed in options.seeds:
        folder = model_folder(options, task, seed)
        if not folder.exists():
            unfinished = folder.with_name(f"{folder.name}.unfinished")
            shutil.copytree(first, unfinished, dirs_exist_ok=True)
            redraw_language_model(unfinished, seed)
            unfinished.rename(folder)


def redraw_language_model(folder: Path, seed: int) -> None:
    """Draw all weights of a demo model but its tower's again, as ilvr_ds/demo/tiny.py draws them."""
    model = load_student(ModelConfig(path=str(folder)), torch.float32, 0)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        drawn = type(model)(load_config(str(folder))).float()
        embedding = drawn.get_input_embeddings().weight
        embedding.div_(embedding.square().mean().sqrt())
    drawn.model.visual.load_state_dict(model.model.visual.state_dict())
    drawn.save_pretrained(folder)
    follow_umask(folder / "model.safetensors")


def _prepare_split(
    options: Any, pool: ProcessPoolExecutor, task: str, forms: list[str], drawn: list[str], split: Split, count: int
) -> None:
    """Draw the samples, derive their other `forms`, draw other samples, and store the vision features of all."""
    _draw_shards(options, pool, "latent", task, split, count)
    waiting = [pool.submit(_derive_shards, options, form, task, split) for form in forms]
    for form in drawn:
        is_look = form == "look" and split == "train"
        _draw_shards(options, pool, form, task, split, options.look_samples or count if is_look else count)
    workers = max(1, options.draw_workers // (1 + len(forms)))
    done = [pool.submit(_encode, options, form, task, split, workers) for form in ("latent", *drawn)]
    for form, job in zip(forms, waiting, strict=True):
        job.result()
        done.append(pool.submit(_encode, options, form, task, split, workers))
    for job in done:
        job.result()


def pixels(options: Any, task: str) -> int:
    """Of a picture whose every cell is a merged patch."""
    return (4 * vision_layout(load_config(str(model_folder(options, task, 0)))).cell) ** 2


def shards_of(options: Any, form: str, task: str, split: Split) -> Path:
    """Where samples of a form lie."""
    path: Path = options.output / f"data-{task}-{form}" / split
    return path


def _draw_shards(options: Any, pool: ProcessPoolExecutor, form: str, task: str, split: Split, count: int) -> None:
    folder = shards_of(options, form, task, split)
    if folder.exists():
        return
    start = time.monotonic()
    jobs = [(form, task, split, start, min(CHUNK, count - start)) for start in range(0, count, CHUNK)]
    pack_samples((sample for part in pool.map(_draw, jobs) for sample in part), folder, max_samples_per_shard=5_000)
    print(f"{folder}: drawn in {time.monotonic() - start:.0f} s", file=sys.stderr)


def _draw(job: tuple[str, str, Split, int, int]) -> list[Sample]:
    form, task, split, start, count = job
    samples = draw_samples(spec_of(form, task), 0, split, count, start)
    return [in_form(sample, form, start + number) for number, sample in enumerate(samples)]


def _derive_shards(options: Any, form: str, task: str, split: Split) -> None:
    """The same samples in another form."""
    folder = shards_of(options, form, task, split)
    if not folder.exists():
        reader = ShardReader(open_dataset(str(shards_of(options, "latent", task, split))))
        samples = (in_form(reader.read(number), form, number, options.latents) for number in range(len(reader)))
        pack_samples(samples, folder, max_samples_per_shard=5_000)


def _encode(options: Any, form: str, task: str, split: Split, workers: int) -> None:
    """Store the vision features of shards, where there are shards without."""
    folder = shards_of(options, form, task, split)
    if folder.exists() and not (folder / "features").exists():
        start = time.monotonic()
        model = ModelConfig(path=str(model_folder(options, task, 0)))
        encode(
            EncodeSettings(str(folder), model, options.precision, pixels(options, task), workers=workers), dist.device()
        )
        print(f"{folder}: encoded in {time.monotonic() - start:.0f} s", file=sys.stderr)


def in_form(sample: Sample, form: str, number: int, latents: int = 0) -> Sample:
    """A sample as an arm wants it: as it is, with boxes around random cells, or without helper pictures.

    latents: of a segment, as many as `pads` has filler tokens.
    """
    texts = [step for step in sample.steps if isinstance(step, TextStep)]
    if form in ("text", "named"):
        return replace(sample, steps=tuple(texts), helper_images=())
    if form == "pads":
        filled = [TextStep(step.content + " ." * latents) for step in texts[:-1]]
        return replace(sample, steps=(*filled, texts[-1]), helper_images=())
    if form == "single":
        return replace(sample, steps=(*texts[:-1], LatentStep(0), texts[-1]), helper_images=sample.helper_images[-1:])
    if form in ("latent", "look"):
        return sample
    draw, steps = np.random.default_rng((7, number)), []
    for step in sample.steps:
        if isinstance(step, LatentStep):
            row, column = draw.integers(4, size=2).tolist()
            box = (column * CELL, row * CELL, (column + 1) * CELL, (row + 1) * CELL)
            step = replace(step, region=box)
        steps.append(step)
    return replace(sample, steps=tuple(steps))
