"""One case of tests/bench/step.py on this rank: a run of the real loop on shards of noise, its metrics kept in memory.

Not started by hand: step.py starts one process for each rank and reads the file that the main rank writes.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ilvr_ds import dist
from ilvr_ds.checkpoint.writer import CheckpointWriter
from ilvr_ds.config import Recipe, recipe_from_dict
from ilvr_ds.data.loader import WindowDataset, WindowLoader, iterate_windows
from ilvr_ds.data.mixture import Mixture
from ilvr_ds.data.plan import SamplePlan
from ilvr_ds.data.shards import open_dataset
from ilvr_ds.data.template import IGNORE
from ilvr_ds.engine.networks import init_process_group
from ilvr_ds.engine.settings import read_deepspeed_json
from ilvr_ds.ingest.pack import pack_samples
from ilvr_ds.model.encoding import Encoding, build_dataset, build_encoding
from ilvr_ds.model.families import family_of
from ilvr_ds.monitoring.metric_sums import MetricSums
from ilvr_ds.monitoring.throughput import Throughput, model_flops, peak_flops
from ilvr_ds.monitoring.watchdog import Watchdog
from ilvr_ds.planning.geometry import geometry_of
from ilvr_ds.planning.memory import GIB, predict_memory
from ilvr_ds.planning.setup import SampleSize, Setup, Zero
from ilvr_ds.provenance import environment, machine
from ilvr_ds.training.assembly import build_step, planned_numbers
from ilvr_ds.training.components import Components
from ilvr_ds.training.pictures import Pictures
from ilvr_ds.training.quarantine import Quarantine
from ilvr_ds.training.quarantines import Quarantines
from ilvr_ds.training.saving import Saver
from ilvr_ds.training.trainer import Trainer
from tests.bench.noise import draw_samples, sizes_of, write_geometry
from tests.bench.syncs import Syncs
from tests.bench.timeline import timeline

PLANNED_FROM = 16
"""Samples whose mean is planned for"""


@dataclass(frozen=True)
class Case:
    """What is measured."""

    name: str
    geometry: str
    """A released model's as `ilvr-ds plan` names it, or one of noise.DEMOS"""
    work: str
    """comt or mixed"""
    has_features: bool
    """Vision features come with the samples: random ones from memory, as no disk would be slower than."""
    settings: dict[str, dict[str, Any]]
    """Sections of the recipe"""
    steps: int
    """Optimizer steps of an interval"""
    repeats: int
    """Intervals after the first, which warms up"""
    samples: int
    """In the shards"""
    check_syncs: bool
    profile: str | None
    """File for torch's profile of one step"""
    folder: str
    """Where geometry and shards are written"""
    gpu_gib: float | None = None
    """That torch may allocate on the GPU; None: all of it"""


class Kept:
    """Stands where the tracker is: keeps what is logged, and says it, so that a case that is stopped leaves something.

    samples: of a step on a rank.
    """

    run_id = None

    def __init__(self, samples: int) -> None:
        self.samples = samples
        self.intervals: list[dict[str, float]] = []

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Keep the metrics of an interval."""
        if "speed/s_per_step" in metrics:
            self.intervals.append(dict(metrics))
            took = 1e3 * metrics["speed/s_per_step"] / self.samples
            memory = metrics.get("memory/peak_device_gib")
            if dist.is_main():
                peak = f", {memory:.1f} GiB" if memory else ""
                print(
                    f"step {step}: {took:.1f} ms a sample, loss {metrics.get('loss/total', math.nan):.4f}{peak}",
                    file=sys.stderr,
                    flush=True,
                )

    def event(self, name: str, **details: Any) -> None:
        """Nothing to keep."""


class RandomFeatures:
    """Stands where stored features are: rows out of one block of noise."""

    retries = 0

    def __init__(self, width: int) -> None:
        noise = torch.randn(4096, width, generator=torch.Generator().manual_seed(0)).bfloat16()
        self.rows = noise.view(torch.int16).numpy().view(np.uint16)

    def read(self, number: int, inputs: int, helpers: int) -> Any:
        """Rows of a sample's images [inputs + helpers, D]."""
        return self.rows[np.arange(number, number + inputs + helpers) % len(self.rows)]

    def empty(self) -> Any:
        """Those of a sample without images."""
        return self.rows[:0]


class NothingSaved(Saver):
    """Stands where checkpoints are saved."""

    def begin(self, done: int, is_last: bool = False) -> None:
        """Weights of noise are not kept."""


def run(case: Case) -> dict[str, Any]:
    """Measure; the same on all ranks, told by the main one."""
    init_process_group()
    if case.gpu_gib is not None:
        total = torch.cuda.get_device_properties(dist.device()).total_memory / 2**30
        torch.cuda.set_per_process_memory_fraction(min(1.0, case.gpu_gib / total), dist.device())
    recipe = recipe_from_dict(case.settings)
    recipe_dir = Path(case.folder)
    shards_folder = recipe_dir / f"{case.work}-{case.samples}"
    dist.decided_by_main(lambda: _write(case, recipe, shards_folder))
    file_settings = read_deepspeed_json(recipe.deepspeed.config)
    encoding = build_encoding(recipe)
    shards, train = open_dataset(str(shards_folder)), recipe.train
    batch = train.micro_batch_size * train.grad_accum_steps
    plan = SamplePlan(shards.shard_sizes, 0, dist.world_size(), batch * dist.world_size(), 4096)
    data = Mixture((shards,))
    numbers = planned_numbers(recipe, plan, data)
    features: Any = RandomFeatures(_feature_width(encoding.model_config)) if case.has_features else None
    dataset = build_dataset(recipe, encoding, data, numbers, features=features)
    is_gpu = dist.device().type == "cuda"
    alone = _loader_alone(dataset, recipe, batch)
    total = case.steps * (1 + case.repeats)
    start = time.perf_counter()
    step, networks = build_step(recipe, file_settings, encoding)
    built = time.perf_counter() - start
    tracker: Any = Kept(batch)
    parts = Components(
        recipe=recipe,
        loader=WindowLoader(dataset, plan, {}, recipe.data.num_workers, is_gpu),
        step=step,
        networks=networks,
        held_out=None,
        tracker=tracker,
        pictures=Pictures(tracker, recipe_dir),
        writer=CheckpointWriter(recipe_dir, networks.student, networks.trained, None, 0, 0, False),
        watchdog=Watchdog(3600.0, 3600.0, lambda: None),
        speed=Throughput(
            model_flops(networks.student.module, encoding.model_config, step.teacher is not None),
            peak_flops(dist.device()),
        ),
        total_steps=total,
        rehearsal=None,
        quarantine=Quarantines(data, [Quarantine(recipe_dir, shards, 0.0, dist.is_main())]),
    )
    trainer = Trainer(parts)
    trainer.saver = NothingSaved(parts)
    trainer.fit()
    parts.watchdog.stop()
    places = _look_closer(case, step, dataset) if is_gpu and (case.check_syncs or case.profile) else {}
    return {
        "case": asdict(case),
        "intervals": tracker.intervals[-case.repeats :],
        "samples_a_step": batch,
        "ranks": dist.world_size(),
        "planned_gib": _planned_gib(recipe, file_settings, encoding, case, is_measured=is_gpu),
        "built_s": built,
        "loader_samples_per_s": alone,
        "syncs": places,
        "environment": environment(dist.gather_on_host(machine(dist.device()))),
    }


def _write(case: Case, recipe: Recipe, shards_folder: Path) -> None:
    model = Path(recipe.model.path)
    if not model.exists():
        write_geometry(model, case.geometry)
    if not shards_folder.exists():
        encoder = build_encoding(recipe).encoder
        samples = draw_samples(case.work, sizes_of(case.geometry), case.samples, encoder.images.cell)
        pack_samples(samples, shards_folder, measure=encoder.count_tokens)


def _feature_width(config: Any) -> int:
    return family_of(config).feature_width(config.vision_config)


def _planned_gib(
    recipe: Recipe, file_settings: dict[str, Any], encoding: Encoding, case: Case, is_measured: bool
) -> float | None:
    """The peak that `ilvr-ds plan` predicts for samples like these, in GiB; None where nothing measures one."""
    if not is_measured:
        return None
    drawn = draw_samples(case.work, sizes_of(case.geometry), PLANNED_FROM, encoding.encoder.images.cell)
    encoded = [encoding.encoder(sample) for sample in drawn]
    sums = [(len(s.input_ids), int((s.labels != IGNORE).sum()), sum(h * w for h, w in s.grids)) for s in encoded]
    sample = SampleSize(*(round(float(mean)) for mean in np.mean(sums, axis=0)))
    zero, geometry = Zero.of(file_settings), geometry_of(encoding.model_config)
    return predict_memory(Setup.of(recipe, zero, geometry, dist.world_size(), sample)).peak / GIB


def _loader_alone(dataset: WindowDataset, recipe: Recipe, batch: int) -> float:
    """Samples a second of this rank's loader when nobody computes; the processes' start does not count."""
    workers = recipe.data.num_workers
    ahead, counted = 2 * workers + 1, max(4, 3 * workers)
    windows = iterate_windows(dataset, range(ahead + counted), workers, dist.device().type == "cuda")
    for _ in range(ahead):
        next(windows)
    start = time.perf_counter()
    for _ in windows:
        pass
    return counted * batch / (time.perf_counter() - start)


def _look_closer(case: Case, step: Any, dataset: WindowDataset) -> dict[str, int]:
    """Two more steps, without the optimizer: synchronisations with the host from batch to backward, the teacher's
    update beside them included, and a profile."""
    syncs, totals = Syncs(), MetricSums(step.sums, dist.device())
    for number in range(2):
        window = dataset[number].pin_memory().to(dist.device())
        torch.cuda.synchronize()
        if case.check_syncs:
            with syncs:
                _forward_and_backward(step, window, totals)
    if case.profile:
        with torch.profiler.profile() as profile:
            _forward_and_backward(step, window, totals)
            torch.cuda.synchronize()
        if dist.is_main():
            table = profile.key_averages().table(sort_by="self_cuda_time_total", row_limit=60)
            Path(case.profile).write_text(f"{timeline(profile.events())}\n{table}")
    return dict(syncs.places)


def _forward_and_backward(step: Any, window: Any, totals: MetricSums) -> None:
    if step.teacher is not None:
        step.teacher.mark_stale()
    prepared = step.prepare(window)
    for micro in prepared.window.micro_batches:
        loss = step.loss(micro, prepared, 0, totals)
        step.student.backward(loss * dist.world_size(), scale_wrt_gas=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", type=Path, required=True)
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("--local_rank", type=int)
    options = parser.parse_args()
    result = run(Case(**json.loads(options.case.read_text())))
    if dist.is_main():
        options.result.write_text(json.dumps(result))
    dist.barrier()
    dist.close()


if __name__ == "__main__":
    main()
