"""Time, memory and use of the chip of whole training steps at a real model's geometry, with random weights.

    python -m tests.bench.step                                     # 3B on one GPU
    python -m tests.bench.step --geometry 7b --gpus 1,2 --cases comt,comt+features,mixed,comt+offload-none
    python -m tests.bench.step --geometry qwen3vl_8b --cases comt+8bit --check-syncs
    python -m tests.bench.step --cpu                               # the demo's model: ratios only

Each case is the real loop (loader processes, ZeRO, optimizer, teacher, logging) on shards of noise; only checkpoints
are left out. After an interval to warm up, several are measured: medians, and the spread from least to most.

Work: comt has one input image of 24x24 cells (576 tokens), three helper images of 16x16 (256 each), a question of about
150 tokens, four texts of about 60 and K = 8: about 1,000 tokens, 280 of them supervised. A cell is a merged patch,
whatever its pixels, so every family has as many tokens. mixed has 1 to 3 input images, 1 to 6 segments and 100 to 1,500
tokens, drawn from a wide distribution. Behind a plus a case may say: features (stored vision features instead of the
tower), offload-none (teacher on the device), full, selective (activation checkpointing), 8bit, cpu-adam (optimizer),
lora (adapters of rank 64), nf4 (with lora: a base in 4 bits), zero1, zero2, kept-weights (of ds_configs).

--check-syncs reports each synchronisation with the host between batch and optimizer step; one besides DeepSpeed's
and the wait for the teacher's update ends the benchmark with exit code 1. --profile FOLDER writes as text
what the device did in a step, for what the host waited, and torch's profile.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from ilvr_ds.planning.geometry import KNOWN
from tests.bench.noise import DEMOS
from tests.bench.step_run import Case
from tests.bench.step_table import render
from tests.bench.syncs import unknown
from tests.ranks import ROOT

WORKS = ("comt", "mixed")
CHOICES: dict[str, dict[str, dict[str, Any]]] = {
    "features": {"data": {"features": "noise"}},
    "offload-none": {"teacher": {"offload": "none"}},
    "full": {"model": {"activation_checkpointing": "full"}},
    "selective": {"model": {"activation_checkpointing": "selective"}},
    "8bit": {"optim": {"name": "adamw_8bit"}},
    "cpu-adam": {
        "optim": {"name": "cpu_adam"},
        "deepspeed": {"config": "ds_configs/zero3_offload_optimizer.json"},
    },
    "lora": {"model": {"lora_rank": 64}},
    "nf4": {"model": {"lora_base": "nf4"}},
    "zero1": {"deepspeed": {"config": "ds_configs/zero1.json"}},
    "zero2": {"deepspeed": {"config": "ds_configs/zero2.json"}},
    "kept-weights": {"deepspeed": {"config": "ds_configs/zero3_kept_weights.json"}},
}


def main() -> None:
    options = _options()
    folder = Path(options.folder or tempfile.gettempdir()) / f"ilvr-bench-{options.geometry}"
    folder.mkdir(parents=True, exist_ok=True)
    results, failed = [], []
    for gpus in options.gpus:
        for name in options.cases:
            try:
                result = _measure(case_of(name, gpus, options, folder), gpus, options.cpu)
            except subprocess.CalledProcessError as error:
                failed.append(f"{name} on {gpus} rank{'s' * (gpus != 1)} failed (exit code {error.returncode})")
                continue
            results.append(result)
            print(json.dumps(result), file=sys.stderr)
    print("\n".join([*(render(results) if results else []), *failed]))
    if failed or any(unknown(result["syncs"]) for result in results):
        raise SystemExit(1)


def _options() -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=[*KNOWN, *DEMOS], default="3b", help="of a released model (default 3b)")
    parser.add_argument("--cases", default="comt,comt+features,mixed", help="(default comt,comt+features,mixed)")
    parser.add_argument("--gpus", default="1", help="numbers of ranks, one after the other: 1,2 (default 1)")
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps of an interval (default 10)")
    parser.add_argument("--repeats", type=int, default=3, help="intervals that are measured (default 3)")
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--accum", type=int, default=2)
    parser.add_argument("--workers", type=int, default=4, help="loader processes of each rank (default 4)")
    parser.add_argument("--samples", type=int, default=128, help="different samples (default 128)")
    parser.add_argument("--deepspeed", help="(default: ds_configs/zero3_single_gpu.json on one rank, else zero3.json)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the recipe")
    parser.add_argument("--check-syncs", action="store_true")
    parser.add_argument("--profile", type=Path, help="folder for a profile of each case")
    parser.add_argument("--folder", help="where models and shards of noise are written (default: temporary files)")
    parser.add_argument("--cpu", action="store_true", help="on the CPU, the demo's model")
    options = parser.parse_args()
    options.cases = options.cases.split(",")
    options.gpus = [int(number) for number in options.gpus.split(",")]
    if options.cpu:
        options.geometry = options.geometry if options.geometry in DEMOS else "demo"
        if options.check_syncs or options.profile:
            parser.error("--check-syncs and --profile need a GPU")
    for name in options.cases:
        work, *choices = name.split("+")
        if work not in WORKS or set(choices) - set(CHOICES):
            parser.error(f"--cases {name}: expected {' or '.join(WORKS)}, and behind a plus {', '.join(CHOICES)}")
    if options.repeats < 1 or options.steps < 1:
        parser.error("--steps and --repeats must be 1 or more")
    return options


def case_of(name: str, gpus: int, options: Any, folder: Path) -> Case:
    """The case of a name like comt+features."""
    work, *choices = name.split("+")
    default = "zero3_single_gpu.json" if gpus == 1 and not options.cpu else "zero3.json"
    settings: dict[str, dict[str, Any]] = {
        "run": {"name": "bench"},
        "data": {"shards": "noise", "num_workers": options.workers},
        "model": {"path": str(folder / "model"), "random_init": options.geometry not in DEMOS},
        "selection": {"temperature": 0.1},
        "train": {
            "micro_batch_size": options.micro_batch,
            "grad_accum_steps": options.accum,
            "precision": "fp32" if options.cpu else "bf16",
        },
        "tracking": {"every_steps": options.steps, "picture_samples": 0},
        "checkpoint": {"every_steps": 0},
        "deepspeed": {"config": options.deepspeed or f"ds_configs/{default}"},
    }
    for choice in choices:
        for section, keys in CHOICES[choice].items():
            settings.setdefault(section, {}).update(keys)
    for override in options.set:
        key, _, value = override.partition("=")
        section, _, key = key.partition(".")
        settings.setdefault(section, {})[key] = yaml.safe_load(value)
    return Case(
        name=name,
        geometry=options.geometry,
        work=work,
        has_features="features" in choices,
        settings=settings,
        steps=options.steps,
        repeats=options.repeats,
        samples=max(options.samples, options.micro_batch * options.accum * gpus),
        check_syncs=options.check_syncs,
        profile=str(options.profile.absolute() / f"{gpus}-{name.replace('+', '-')}.txt") if options.profile else None,
        folder=str(folder),
    )


def _measure(case: Case, gpus: int, is_cpu: bool) -> dict[str, Any]:
    """Run the case in processes of its own."""
    print(f"{case.name} on {gpus} rank{'s' * (gpus != 1)}", file=sys.stderr)
    start = time.monotonic()
    if case.profile:
        Path(case.profile).parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"{name}.json" for name in ("case", "result")}
        files["case"].write_text(json.dumps(asdict(case)))
        launcher = [sys.executable, "-m"]
        if gpus > 1:
            launcher += ["deepspeed.launcher.runner", "--num_gpus", str(gpus), "--module"]
        command = [*launcher, "tests.bench.step_run", "--case", files["case"], "--result", files["result"]]
        environment = {**os.environ, **({"DS_ACCELERATOR": "cpu"} if is_cpu else {})}
        subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=sys.stderr)
        result: dict[str, Any] = json.loads(files["result"].read_text())
        print(f"took {time.monotonic() - start:.0f} s, of it {result['built_s']:.0f} s building", file=sys.stderr)
        return result


if __name__ == "__main__":
    main()
