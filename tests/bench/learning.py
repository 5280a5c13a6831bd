"""Does it learn to look? A random model on the demo task, with its images and without.

    python -m tests.bench.learning --output outputs/learning                                       # 25 M, on a GPU
    python -m tests.bench.learning --output outputs/learning --size tiny --precision fp32 --ordered --batch 64 \\
        --lr 2e-3 --samples 60000 --held-out 1024 --steps 5000 --workers 1 --control-workers 1     # 0.2 M, on a CPU

Draws and packs the task, trains stage 1 twice through `launch/train.sh` (the second time with every image grey), and
shows the accuracy of the answer on held-out samples over time, as tables and as `learning.png`. Chance is 25 %.
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

from ilvr_ds.data.sample import Sample
from ilvr_ds.demo.material import write_demo_model
from ilvr_ds.demo.task import OPERATIONS, TaskSpec, draw_samples
from ilvr_ds.demo.task.generate import Split
from ilvr_ds.ingest.pack import pack_samples

CHUNK = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=200_000)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--control-steps", type=int, default=1000, help="0: do not train without images")
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=7e-4)
    parser.add_argument("--size", default="small")
    parser.add_argument("--operations", nargs="+", choices=OPERATIONS, default=list(OPERATIONS))
    parser.add_argument("--ordered", action="store_true", help="options in a fixed order: the easier level")
    parser.add_argument("--held-out", type=int, default=4096)
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--control-workers", type=int, default=3)
    parser.add_argument("--draw-only", action="store_true", help="end when the data lie in the output folder")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--deepspeed", default="ds_configs/zero3_single_gpu.json")
    parser.add_argument("--minutes", type=float, default=60.0, help="ask the runs to stop after this time")
    options = parser.parse_args()
    spec = TaskSpec(operations=tuple(options.operations), shuffled_options=not options.ordered)
    if not (options.output / "held_out").exists():
        draw_data(options.output, spec, options.samples, options.held_out, options.workers)
    if options.draw_only:
        return
    write_demo_model(options.output / "model", spec, options.size)
    runs = {"seeing": start(options, "seeing", options.steps, options.workers, blank=False)}
    if options.control_steps:
        runs["blind"] = start(options, "blind", options.control_steps, options.control_workers, blank=True)
    deadline = time.monotonic() + 60 * options.minutes
    codes = [finish(run, deadline) for run in runs.values()]
    if any(codes):
        sys.exit(f"failed, see {' and '.join(str(options.output / f'{name}.log') for name in runs)}")
    curves = {name: read_curve(options.output / "runs" / name / "metrics.jsonl", options.batch) for name in runs}
    for name, curve in curves.items():
        print_table(name, curve, options.operations)
    draw_chart(options.output / "learning.png", curves, options.operations)


def draw_data(output: Path, spec: TaskSpec, count: int, held_out: int, workers: int) -> None:
    """Train and held-out shards, drawn in parallel."""
    for split, number in (("train", count), ("held_out", held_out)):
        pack_samples(_drawn(spec, split, number, workers), output / split, max_samples_per_shard=10_000, overwrite=True)


def _drawn(spec: TaskSpec, split: Split, count: int, workers: int) -> Iterator[Sample]:
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        jobs = [(spec, split, start, min(CHUNK, count - start)) for start in range(0, count, CHUNK)]
        for part in pool.map(_draw, jobs):
            yield from part


def _draw(job: tuple[TaskSpec, Split, int, int]) -> list[Sample]:
    spec, split, start, count = job
    return list(draw_samples(spec, 0, split, count, start))


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
        "loss": {"align_weight": 0.2, "contrastive_weight": 0.02},
        "optim": {
            "lr": options.lr, "warmup_steps": 150, "schedule": "linear", "min_lr_ratio": 0.1, "beta2": 0.99,
            "max_grad_norm": 0.5,
        },
        "train": {"max_steps": steps, "micro_batch_size": options.batch, "precision": options.precision},
        "evaluation": {"every_steps": 200, "max_samples": options.held_out},
        "checkpoint": {"every_steps": 0},
        "tracking": {"every_steps": 50, "experiment": "learning"},
        "deepspeed": {"config": options.deepspeed},
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


def read_curve(path: Path, batch: int) -> list[tuple[int, dict[str, float]]]:
    """Samples seen and the held-out metrics then, from a run's record."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    held_out = [(line["step"] * batch, line["metrics"]) for line in lines if "eval/ce" in line.get("metrics", {})]
    return [(seen, {key: float(value) for key, value in metrics.items()}) for seen, metrics in held_out]


def accuracies(metrics: dict[str, float], operations: list[str]) -> list[float]:
    """Of all samples, then by operation, in per cent."""
    keys = ["eval/answer_accuracy", *(f"eval/answer_accuracy/{operation}" for operation in operations)]
    return [100 * metrics[key] for key in keys]


def print_table(name: str, curve: list[tuple[int, dict[str, float]]], operations: list[str]) -> None:
    """Held-out accuracy over time, by operation, in per cent."""
    print(f"\n{name}: held-out accuracy in per cent (chance 25)")
    print(f"{'samples':>10} {'eval ce':>8} " + " ".join(f"{column:>10}" for column in ("all", *operations)))
    for seen, metrics in curve:
        values = " ".join(f"{value:>10.1f}" for value in accuracies(metrics, operations))
        print(f"{seen:>10,} {metrics['eval/ce']:>8.4f} {values}")


def draw_chart(path: Path, curves: dict[str, list[tuple[int, dict[str, float]]]], operations: list[str]) -> None:
    """Accuracy over training samples: a line an operation, and all samples with grey images."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    colours = ["black", "#0072b2", "#d55e00", "#009e73", "#cc79a7"]  # told apart by colour-blind readers too
    for column, (name, colour) in enumerate(zip(("all", *operations), colours, strict=False)):
        points = [(seen, accuracies(metrics, operations)[column]) for seen, metrics in curves["seeing"]]
        axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=3, label=name)
    if curves.get("blind"):
        points = [(seen, accuracies(metrics, operations)[0]) for seen, metrics in curves["blind"]]
        axes.plot(*zip(*points, strict=True), color="grey", linestyle="--", marker="x", label="all, grey images")
    axes.axhline(25, color="grey", linewidth=1, linestyle=":", label="chance")
    axes.set(xlabel="training samples", ylabel="right answers on held-out samples, %", xlim=(0, None), ylim=(0, 102))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150, bbox_inches="tight")


if __name__ == "__main__":
    main()
