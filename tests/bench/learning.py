"""Does it learn to look? A model of 25 M parameters on the demo task, with its images and without; needs a GPU.

    python -m tests.bench.learning --output outputs/learning --samples 200000 --steps 4000

Draws and packs the task, trains stage 1 twice through `launch/train.sh` (the second time with every image grey), and
prints the accuracy of the answer on held-out samples over time. Chance is 25 %.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import yaml

from ilvr_ds.data.pack import pack_samples
from ilvr_ds.data.sample import Sample
from ilvr_ds.data.synthetic import OPERATIONS, TaskSpec, draw_samples
from ilvr_ds.demo import write_demo_model

CHUNK = 500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=200_000)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--control-steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--size", default="small")
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--control-workers", type=int, default=3)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--minutes", type=float, default=60.0, help="ask the runs to stop after this time")
    options = parser.parse_args()
    draw_data(options.output, options.samples, options.workers)
    write_demo_model(options.output / "model", TaskSpec(), options.size)
    runs = [
        start(options, "seeing", options.steps, options.workers, blank=False),
        start(options, "blind", options.control_steps, options.control_workers, blank=True),
    ]
    deadline = time.monotonic() + 60 * options.minutes
    codes = [finish(run, deadline) for run in runs]
    for name in ("seeing", "blind"):
        print_table(options.output / "runs" / name / "metrics.jsonl", name, options.batch)
    sys.exit(max(codes))


def draw_data(output: Path, count: int, workers: int) -> None:
    """Train and held-out shards, drawn in parallel."""
    for split, number in (("train", count), ("held_out", 4096)):
        pack_samples(_drawn(split, number, workers), output / split, max_samples_per_shard=10_000, overwrite=True)


def _drawn(split: str, count: int, workers: int) -> Iterator[Sample]:
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for part in pool.map(_draw, [(split, start) for start in range(0, count, CHUNK)]):
            yield from part


def _draw(job: tuple[str, int]) -> list[Sample]:
    split, start = job
    return list(draw_samples(TaskSpec(), 0, split, CHUNK, start))


def start(options: argparse.Namespace, name: str, steps: int, workers: int, blank: bool) -> subprocess.Popen[bytes]:
    """Start a training run in the background."""
    output = options.output.absolute()
    recipe = {
        "run": {"name": name, "output_dir": str(output / "runs")},
        "data": {
            "shards": str(output / "train"), "eval_shards": str(output / "held_out"), "max_tokens": 512, "lanes": 64,
            "num_workers": workers, "blank_images": blank,
        },
        "model": {"path": str(output / "model"), "latent_size": 8},
        "teacher": {"momentum": 0.99},
        "selection": {"temperature": 0.1},
        "loss": {"align_weight": 0.1, "contrastive_weight": 0.02},
        "optim": {"lr": options.lr, "warmup_steps": 200, "schedule": "linear", "min_lr_ratio": 0.1, "beta2": 0.98},
        "train": {"max_steps": steps, "micro_batch_size": options.batch, "precision": options.precision},
        "evaluation": {"every_steps": 200, "max_samples": 4096},
        "checkpoint": {"every_steps": 0},
        "tracking": {"every_steps": 50, "experiment": "learning"},
        "deepspeed": {"config": "ds_configs/zero3_single_gpu.json"},
    }  # fmt: skip
    path = output / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    log = (output / f"{name}.log").open("w")
    command = [sys.executable, "launch/train.sh", "--config", str(path)]
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def finish(run: subprocess.Popen[bytes], deadline: float) -> int:
    """Wait for a run; when its time is over, ask it to stop after its step, which saves it."""
    try:
        return run.wait(max(1.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        run.terminate()
        return run.wait()


def print_table(path: Path, name: str, batch: int) -> None:
    """Held-out accuracy over time, by operation, in per cent."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    print(f"\n{name}: held-out accuracy in per cent (chance 25)")
    print(f"{'samples':>10} {'eval ce':>8} {'all':>6} " + " ".join(f"{op:>10}" for op in OPERATIONS))
    for line in lines:
        metrics = line.get("metrics", {})
        if "eval/answer_accuracy" in metrics:
            by_operation = [100 * float(metrics[f"eval/answer_accuracy/{op}"]) for op in OPERATIONS]
            total = 100 * float(metrics["eval/answer_accuracy"])
            print(
                f"{line['step'] * batch:>10,} {float(metrics['eval/ce']):>8.4f} {total:>6.1f} "
                + " ".join(f"{value:>10.1f}" for value in by_operation)
            )


if __name__ == "__main__":
    main()
