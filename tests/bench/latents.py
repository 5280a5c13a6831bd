"""When do latents matter? One task, equal data and steps, and what the latents are taught as the only difference.

    python -m tests.bench.latents --output outputs/latents                       # the main arms, N = 6, on a GPU
    python -m tests.bench.latents --output outputs/latents --arms changed --signs 3 6 9 --seeds 0 1 2
    python -m tests.bench.latents --output /tmp/l --size tiny --precision fp32 --samples 256 --held-out 32 --steps 2 \\
        --second-steps 2 --batch 32 --arms changed --together 1                  # anywhere, to see that it runs

    python -m tests.bench.latents --output outputs/operations --task operations --latents 4    # after it has seen

Draws `trail` (ilvr_ds/demo/task/trail.py), packs it, stores its vision features, trains each arm through
`launch/train.sh`, exports it and reads its free answers with `ilvr-ds audit`. Each reading is a line of
OUTPUT/results.jsonl; the table at the end and results.png are made of that file, also later by `--table-only`. Arms are
spread over the GPUs that there are; those of one length train while the data of the next are drawn.

Arms: text (steps that say nothing), named (steps that name the figure), pads (the same words and filler tokens),
single (one segment, of the last picture), random (latents of random patches), published (`selection.pool: all`), query
(the published query among what changed), changed (what changed most from the picture before), others (the same, told
apart from other samples' candidates too, with three times the weight), nearest (what is least like any patch of the
earlier pictures), region (the marked cell, told by the data; one latent).
Behind an @ the steps of the first stage, where they are not --steps; behind a plus the second stages: detached (own
latents, targets kept), through (the same, gradient through the whole chain) or full (cross-entropy alone through the
whole chain, as published). What OUTPUT holds already is not done again; OUTPUT/settings.json has the options that it
was made with, and others are refused. The table marks what ended before its last step (--minutes).

With `--task operations` it is about the four operations like CoMT's, and the model first learns to see: all arms begin
from one run of --look-steps on `look` (ilvr_ds/demo/task/look.py), which has no helper pictures.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Lock
from typing import Any

import yaml

from ilvr_ds.audit.settings import parse_tests
from ilvr_ds.demo.material import SIZES
from ilvr_ds.errors import UserError
from ilvr_ds.tracking.registry import read_origin
from tests.bench.gpu_slots import gpus, on_gpu, slots_of
from tests.bench.latents_arms import ARMS, LOOK, MAIN, OF_OPERATIONS, SECOND
from tests.bench.latents_data import FOUR, model_folder, pixels, prepare
from tests.bench.latents_operations import accuracy_by_operation, operations_table
from tests.bench.latents_settings import keep_settings
from tests.bench.latents_table import draw_results, read_results, table

LANES = 32
ANSWER_SIGNS = 8
"""An answer to an operation is at most as long as that of a trail of so many signs"""


def main() -> None:
    options = _options()
    results, is_whole = options.output / "results.jsonl", True
    if not options.table_only:
        try:
            keep_settings(options)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        cases = [Case(options, name, signs, seed) for signs in options.signs for seed in options.seeds
                 for name in options.arms]  # fmt: skip
        looks = [Case(options, LOOK, 0, seed) for seed in options.seeds if options.looks]
        with ThreadPoolExecutor(1) as drawing:
            forms = {case.form for case in (*looks, *cases)}
            drawn = {
                task: drawing.submit(prepare, options, task, forms) for task in {case.task: None for case in cases}
            }
            if not options.draw_only:
                slots, looked = slots_of(options.together, gpus()), {case.seed: Event() for case in looks}
                is_whole = train_all(looks, cases, Shared(results, Lock(), slots, drawn, looked))
        if options.draw_only:
            for job in drawn.values():
                job.result()
            return
    if not results.exists():
        raise SystemExit(f"{results}: no arm has been read")
    groups = read_results(results)
    print("\n".join(table(groups)))
    draw_results(groups, options.output / "results.png")
    if options.task == FOUR:
        print("\n".join(["", *operations_table(groups)]))
    raise SystemExit(not is_whole)


def train_all(looks: Sequence[Case], cases: Sequence[Case], shared: Shared) -> bool:
    """Run all cases, as many together as there are places, and say what failed; whether nothing did."""
    places = shared.slots.qsize()
    with ThreadPoolExecutor(places) as before, ThreadPoolExecutor(places) as pool:
        jobs = [before.submit(case.run, shared) for case in looks] + [pool.submit(case.run, shared) for case in cases]
        failures = [failure for job in jobs if (failure := job.result())]
    for failure in failures:
        print(failure, file=sys.stderr)
    return not failures


@dataclass(frozen=True)
class Shared:
    """What cases that run at the same time have in common."""

    results: Path
    lock: Lock
    """Of that file"""
    slots: SimpleQueue[str]
    """GPUs that an arm can run on, as often as it has room"""
    drawn: dict[str, Future[None]]
    """The data, by task"""
    looked: dict[int, Event]
    """Whether the run that the arms of a seed begin from has been trained, where there is one"""


class CommandError(Exception):
    """A command that failed: where its output is, and the end of it."""

    def __init__(self, log: Path) -> None:
        super().__init__(f"{log}: {(log.read_text().splitlines() or ['is empty'])[-1]}")


def run_command(arguments: list[Any], log: Path, gpu: str) -> None:
    """Run ilvr-ds."""
    command = [sys.executable, "-m", "ilvr_ds.cli", *map(str, arguments)]
    with log.open("w") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=on_gpu(gpu))
    if done.returncode:
        raise CommandError(log)


def _options() -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--arms", nargs="+", metavar="ARM[@STEPS][+STAGE...]")
    parser.add_argument("--task", choices=("trail", FOUR), default="trail")
    parser.add_argument("--look-steps", type=int, default=400, help="before --task operations; 0: none (default 400)")
    parser.add_argument("--look-samples", type=int, default=0, help="to look at (default: as many as --samples)")
    parser.add_argument("--signs", type=int, nargs="+", help="length of the trail (default 6)")
    varied = "of the language model's weights, sample order and noise; data and tower are the same (default 0)"
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help=varied)
    parser.add_argument("--samples", type=int, default=24_000)
    parser.add_argument("--held-out", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--second-steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--accum", type=int, default=1, help="micro-batches of a step (default 1)")
    parser.add_argument("--look-every", type=int, default=250, help="steps between looks at held-out samples")
    parser.add_argument("--lr", type=float, default=8e-4)
    parser.add_argument("--second-lr", type=float, default=1.6e-4)
    parser.add_argument("--latents", type=int, default=2, help="of a segment (default 2)")
    parser.add_argument("--size", choices=SIZES, default="medium")
    parser.add_argument("--family", default="qwen2_5_vl", help="of the model (default qwen2_5_vl)")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--together", type=int, default=5, help="arms that train at once on each GPU (default 5)")
    parser.add_argument("--workers", type=int, default=2, help="loader processes of each arm (default 2)")
    parser.add_argument("--draw-workers", type=int, default=14)
    parser.add_argument("--tests", default="replacement,donor", help="of the audit (default replacement,donor)")
    parser.add_argument("--minutes", type=float, default=60.0, help="of a stage, at most; then it saves and ends")
    parser.add_argument("--draw-only", action="store_true", help="end when the data lie in the output folder")
    parser.add_argument("--table-only", action="store_true")
    options = parser.parse_args()
    options.output = options.output.absolute()
    options.looks = options.task == FOUR and options.look_steps > 0
    options.arms = options.arms or (list(OF_OPERATIONS[:3]) if options.task == FOUR else MAIN)
    if options.task == FOUR and options.signs:
        parser.error("--signs: only a trail has signs; leave it out with --task operations")
    options.signs = [0] if options.task == FOUR else options.signs or [6]
    if options.batch % LANES:
        parser.error(f"--batch {options.batch}: expected a multiple of {LANES}, the lanes of the data")
    if options.held_out < options.batch // options.accum:
        parser.error(f"--held-out {options.held_out}: a micro-batch has {options.batch // options.accum}; raise it")
    known = [arm for arm in ARMS if arm != LOOK and (arm in OF_OPERATIONS or options.task != FOUR)]
    for name in options.arms:
        title, *second = name.split("+")
        arm, _, steps = title.partition("@")
        if arm not in known or not (steps or "1").isdigit() or set(second) - set(SECOND) or (
            second and not ARMS[arm].has_latents
        ):  # fmt: skip
            parser.error(
                f"--arms {name}: expected one of {', '.join(known)}, behind it @STEPS, and for those with "
                f"latents +{', +'.join(SECOND)}"
            )
    try:
        if "replacement" not in parse_tests(options.tests):
            parser.error(f"--tests {options.tests}: replacement is missing, of which the table is made; add it")
    except UserError as error:
        parser.error(str(error))
    return options


@dataclass(frozen=True)
class Case:
    """An arm with a length of trail, 0 for operations, and a seed."""

    options: Any
    name: str
    signs: int
    seed: int

    @property
    def title(self) -> str:
        """Without its second stages."""
        return self.name.split("+")[0]

    @property
    def arm(self) -> str:
        """Without its steps either."""
        return self.title.split("@")[0]

    @property
    def form(self) -> str:
        """Of its samples."""
        return ARMS[self.arm].form

    @property
    def task(self) -> str:
        """As its data and model are named."""
        return str(self.signs) if self.signs else FOUR

    @property
    def steps(self) -> int:
        """Of the first stage."""
        if self.arm == LOOK:
            return int(self.options.look_steps)
        return int(self.title.partition("@")[2] or self.options.steps)

    def run(self, shared: Shared) -> str | None:
        """Train, and write down what is read after each stage, as soon as there are data, a place, and the run that it
        begins from; returns what failed."""
        shared.drawn[self.task].result()
        looked = shared.looked.get(self.seed)
        if looked and self.arm != LOOK:
            looked.wait()
        gpu = shared.slots.get()
        try:
            return self._run(shared, gpu)
        finally:
            shared.slots.put(gpu)
            if looked:
                looked.set()

    def _run(self, shared: Shared, gpu: str) -> str | None:
        results, looked = shared.results, shared.looked.get(self.seed)
        done = {json.loads(line)["run"] for line in results.read_text().splitlines()} if results.exists() else set()
        try:
            for stage in ("1", *self.name.split("+")[1:]):
                run = f"{self.title.replace('@', '-')}-n{self.signs}-s{self.seed}-{stage}"
                if run in done:
                    continue
                started = time.monotonic()
                seconds = self._train(run, stage, gpu)
                if looked:
                    looked.set()
                found = self._read(run, gpu)
                line = {"run": run, "arm": self.title, "signs": self.signs, "seed": self.seed, "stage": stage,
                        "seconds": seconds, "wall": time.monotonic() - started, **self._last_metrics(run),
                        "steps": read_origin(str(self._model(run)))["step"], "planned_steps": self._planned(stage),
                        **found}  # fmt: skip
                with shared.lock, results.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                print(json.dumps(line), file=sys.stderr, flush=True)
        except CommandError as failure:
            return f"{self.name}, N = {self.signs}, seed {self.seed} failed: {failure}"
        return None

    def _planned(self, stage: str) -> int:
        """Steps of a stage."""
        return self.steps if stage == "1" else int(self.options.second_steps)

    def _model(self, run: str) -> Path:
        """Where a run is exported to."""
        path: Path = self.options.output / "models" / run
        return path

    def _train(self, run: str, stage: str, gpu: str) -> float:
        path = self.options.output / f"{run}.yaml"
        path.write_text(yaml.safe_dump(self.recipe(run, stage)))
        started = time.monotonic()
        log = path.with_suffix(".log")
        with log.open("w") as file:
            command = [sys.executable, "launch/train.sh", "--config", str(path)]
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=on_gpu(gpu))
            try:
                process.wait(60 * self.options.minutes)
            except subprocess.TimeoutExpired:
                process.terminate()  # it saves after its step
                process.wait()
        if process.returncode:
            raise CommandError(log)
        return time.monotonic() - started

    def recipe(self, run: str, stage: str) -> dict[str, Any]:
        """The settings of a stage: 1, detached or full."""
        output, is_first, options = self.options.output, stage == "1", self.options
        data, model = output / f"data-{self.task}-{self.form}", model_folder(options, self.task, self.seed)
        arm, weights = ARMS[self.arm], {"align_weight": 0.0, "contrastive_weight": 0.0} if stage == "full" else {}
        recipe: dict[str, Any] = {
            "run": {"name": run, "output_dir": str(output / "runs"), "seed": self.seed},
            "data": {
                "shards": str(data / "train"), "eval_shards": str(data / "held_out"), "max_tokens": 512, "lanes": LANES,
                "features": str(data / "train/features"), "eval_features": str(data / "held_out/features"),
                "num_workers": options.workers * (options.together if self.arm == LOOK else 1),
                "max_image_pixels": pixels(options, self.task),
            },
            "model": {"path": str(model), "latent_size": arm.latents or options.latents},
            "teacher": {"momentum": 0.99, "offload": "none"},
            "selection": arm.selection,
            "loss": {"contrastive_temperature": 0.1, "contrastive_weight": 0.1, **arm.loss, **weights},
            "optim": {
                "lr": options.lr if is_first else options.second_lr, "warmup_steps": 100 if is_first else 20,
                "schedule": "linear", "min_lr_ratio": 0.05, "beta2": 0.98, "weight_decay": 0.01,
            },
            "train": {"max_steps": self._planned(stage),
                      "micro_batch_size": options.batch // options.accum, "grad_accum_steps": options.accum,
                      "precision": options.precision},
            "evaluation": {"max_samples": min(512, options.held_out), "every_steps": options.look_every},
            "checkpoint": {"every_steps": 0},
            "tracking": {"every_steps": 50, "experiment": "latents", "picture_samples": 0},
            "deepspeed": {"config": str(Path("ds_configs/zero2.json").absolute())},
        }  # fmt: skip
        if is_first and options.looks and self.arm != LOOK:
            recipe["model"]["init_from"] = str(output / "runs" / f"{LOOK}-n0-s{self.seed}-1")
        if not is_first:
            recipe["model"]["init_from"] = str(output / "runs" / run.removesuffix(stage)) + "1"
            recipe["train"] |= {"stage": 2, "latent_gradient": "detached" if stage == "detached" else "full"}
        return recipe

    def _read(self, run: str, gpu: str) -> dict[str, Any]:
        """Export the run and read its free answers."""
        folder, model = self.options.output / "runs" / run, self._model(run)
        run_command(["export", folder, "--to", model, "--overwrite"], folder / "export.log", gpu)
        data = self.options.output / f"data-{self.task}-{self.form}" / "held_out"
        tokens = 24 + 14 * (self.signs or ANSWER_SIGNS)
        common = ["--model", model, "--shards", data, "--benchmark", "option-letter", "--batch-size", 256,
                  "--max-new-tokens", tokens, "--precision", self.options.precision]  # fmt: skip
        if not ARMS[self.arm].has_latents:
            run_command(["evaluate", *common, "--output", model / "readings"], folder / "evaluate.log", gpu)
            scores = json.loads((model / "readings/scores.json").read_text())
            score = scores["rules"][next(iter(scores["rules"]))]
            found = {"own": score["accuracy"], "samples": {"own": sum(t["samples"] for t in score["types"].values())}}
        else:
            tests = ["--tests", self.options.tests]
            run_command(["audit", *common, "--output", model / "readings", *tests], folder / "audit.log", gpu)
            found = readings(json.loads((model / "readings/audit.json").read_text()))
        return found | (accuracy_by_operation(model / "readings") if self.task == FOUR else {})

    def _last_metrics(self, run: str) -> dict[str, float]:
        """The last of what training logged that says whether it learned."""
        lines = (self.options.output / "runs" / run / "metrics.jsonl").read_text().splitlines()
        found: dict[str, float] = {}
        for line in map(json.loads, lines):
            metrics = line.get("metrics", {})
            found |= {
                key: float(value) for key, value in metrics.items() if key.startswith(("loss/", "select/", "grad/"))
            }
            if "eval/answer_accuracy" in metrics:
                found["teacher_forced"] = float(metrics["eval/answer_accuracy"])
        return found


def readings(audit: dict[str, Any]) -> dict[str, Any]:
    """Accuracies by what stood in the latents' place, of how many samples, and how many answers followed a donor's."""
    replaced = audit["replacement"]
    found = {name: part["accuracy"] for name, part in replaced.items()}
    found["samples"] = {name: part["samples"] for name, part in replaced.items()}
    donor, inside = audit.get("donor", {}), audit.get("inside", {})
    if "follows_donor" in donor:
        found |= {"donor": donor["follows_donor"], "unrelated": donor["unrelated"]}
    return found | {"inside": inside} if inside else found


if __name__ == "__main__":
    main()
