"""The demo task as a folder in the authors' format: JSON Lines and image files."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from ilvr_ds.data.sample import Sample, TextStep
from ilvr_ds.demo.task.generate import Split, draw_samples
from ilvr_ds.demo.task.spec import TaskSpec
from ilvr_ds.errors import UserError

_CHUNK = 256


def write_task(directory: Path, spec: TaskSpec, seed: int, train: int, held_out: int, workers: int = 1) -> None:
    """Write train.jsonl, held_out.jsonl and images/ with `train` and `held_out` samples into a new folder.

    The same arguments give the same files, whatever `workers` (processes) is. The folder appears under its name
    when it is whole, and not before. Raises UserError where it exists already or a number is out of range.
    """
    if directory.exists():
        raise UserError(f"{directory}: exists already; remove it or choose another folder")
    if min(train, held_out) < 0 or workers < 1:
        raise UserError(f"train {train}, held_out {held_out}, workers {workers}: expected at least 0, 0 and 1")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{directory.name}-", dir=directory.parent) as scratch:
        root = Path(scratch) / directory.name
        for operation in spec.operations:
            (root / "images" / operation).mkdir(parents=True)
        counts: dict[Split, int] = {"train": train, "held_out": held_out}
        for split, count in counts.items():
            jobs = [
                _Job(root, spec, seed, split, start, min(_CHUNK, count - start)) for start in range(0, count, _CHUNK)
            ]
            with (root / f"{split}.jsonl").open("w", encoding="utf-8") as file:
                file.writelines(_run(jobs, workers))
        root.rename(directory)


@dataclass(frozen=True)
class _Job:
    """A run of samples for one process."""

    root: Path
    spec: TaskSpec
    seed: int
    split: Split
    start: int
    count: int


def _run(jobs: list[_Job], workers: int) -> Iterator[str]:
    """The lines of all jobs in order."""
    if workers == 1:
        yield from map(_write_samples, jobs)
        return
    context = multiprocessing.get_context("spawn")  # a fork of a process with torch's threads can hang
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        yield from pool.map(_write_samples, jobs)


def _write_samples(job: _Job) -> str:
    """Write the images of a job; return its lines."""
    lines = []
    for sample in draw_samples(job.spec, job.seed, job.split, job.count, job.start):
        stem = f"images/{sample.group}/{sample.id}"
        given = [f"{stem}-input{number}.png" for number in range(len(sample.input_images))]
        helpers = [f"{stem}-helper{number}.png" for number in range(len(sample.helper_images))]
        images = (*sample.input_images, *sample.helper_images)
        for path, data in zip([*given, *helpers], images, strict=True):
            (job.root / path).write_bytes(data)
        lines.append(json.dumps(_record(sample, given, helpers)) + "\n")
    return "".join(lines)


def _record(sample: Sample, given: list[str], helpers: list[str]) -> dict[str, object]:
    plan = [
        {"type": "text", "content": step.content}
        if isinstance(step, TextStep)
        else {"type": "latent", "helper_image": helpers[step.helper]} | ({"region": step.region} if step.region else {})
        for step in sample.steps
    ]
    return {
        "id": sample.id,
        "group": sample.group,
        "text_input": sample.question,
        "image_input": given,
        "sequence_plan": plan,
        "original_final_answer": sample.answer,
    }
