"""Do the recipes for one card stay within it? Twenty steps of either stage with random weights, beside their plan.

    python -m tests.bench.one_card                                       # 3B within the memory of an RTX 3090
    python -m tests.bench.one_card --recipe comt_7b_48gb --card A6000
    python -m tests.bench.one_card --cpu                                 # the demo's model: that it runs

The recipe is the shipped one but for its data, shards of noise with about 1,000 tokens a sample, and its weights. On a
larger GPU torch may allocate no more than the card has, less what a plan takes for CUDA. A peak that is more than 3 %
off the plan, or a stage that does not fit, ends with exit code 1.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ilvr_ds import shipped
from ilvr_ds.config import Recipe, load_recipe, recipe_from_dict
from ilvr_ds.engine.settings import read_deepspeed_json
from ilvr_ds.model.student import load_config
from ilvr_ds.planning.chips import find_card
from ilvr_ds.planning.geometry import geometry_of
from ilvr_ds.planning.memory import CONTEXT, GIB, predict_memory
from ilvr_ds.planning.search import MARGIN
from ilvr_ds.planning.setup import SampleSize, Setup, Zero
from tests.bench.step_run import Case
from tests.ranks import ROOT

STAGES = ("", "-stage2")
STEPS, REPEATS = 5, 3
"""An interval to warm up and three more: 20 steps"""
TOKENS = 999
"""Of a sample of noise, in the mean"""


def main() -> None:
    options = _options()
    folder = Path(options.folder or tempfile.gettempdir()) / f"ilvr-one-card-{options.geometry}"
    folder.mkdir(parents=True, exist_ok=True)
    _, card = find_card(options.card)
    cap = None if options.cpu else card.gib - CONTEXT / GIB
    print("| recipe | peak GiB | planned GiB | off by | ms a sample |\n|---|---|---|---|---|")
    failed = False
    for stage in STAGES if options.stage is None else STAGES[options.stage - 1 : options.stage]:
        recipe = _recipe(f"{options.recipe}{stage}", folder, options)
        intervals = _measure(_case(recipe, stage, folder, options, cap), options.cpu)
        failed = _report(recipe, f"{options.recipe}{stage}", intervals) or failed
    raise SystemExit(failed)


def _options() -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="comt_3b_24gb", help="(default comt_3b_24gb); its stage 2 follows")
    parser.add_argument("--card", default="RTX 3090", help="whose memory torch may take (default RTX 3090)")
    parser.add_argument("--stage", type=int, choices=[1, 2], help="one of them only (default: both)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the recipe")
    parser.add_argument("--workers", type=int, default=4, help="loader processes (default 4)")
    parser.add_argument("--folder", help="where model and shards of noise are written (default: temporary files)")
    parser.add_argument("--cpu", action="store_true", help="the demo's model on the CPU")
    options = parser.parse_args()
    options.geometry = "demo" if options.cpu else next(name for name in ("7b", "3b") if name in options.recipe)
    return options


def _recipe(name: str, folder: Path, options: Any) -> Recipe:
    """The shipped recipe with noise for data and weights."""
    sections = load_recipe(shipped.recipes()[name], options.set).to_dict()
    sections["run"] |= {"name": "bench"}
    sections["data"] |= {"shards": "noise", "eval_shards": None, "num_workers": options.workers}
    sections["model"] |= {"path": str(folder / "model"), "random_init": not options.cpu, "init_from": None}
    sections["train"] |= {"precision": "fp32" if options.cpu else "bf16"}
    sections["tracking"] |= {"every_steps": STEPS, "picture_samples": 0}
    sections["checkpoint"] |= {"every_steps": 0}
    sections["evaluation"] |= {"every_steps": 0}
    return recipe_from_dict(sections)


def _case(recipe: Recipe, stage: str, folder: Path, options: Any, cap: float | None) -> Case:
    train = recipe.train
    return Case(
        name=f"comt{stage}",
        geometry=options.geometry,
        work="comt",
        has_features=False,
        settings=recipe.to_dict(),
        steps=STEPS,
        repeats=REPEATS,
        samples=4 * train.micro_batch_size * train.grad_accum_steps,
        check_syncs=False,
        profile=None,
        folder=str(folder),
        gpu_gib=cap,
    )


def _measure(case: Case, is_cpu: bool) -> list[dict[str, float]] | None:
    """The metrics of the last intervals, from a process of its own; None where it failed."""
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"{name}.json" for name in ("case", "result")}
        files["case"].write_text(json.dumps(asdict(case)))
        command = [sys.executable, "-m", "tests.bench.step_run", "--case", files["case"], "--result", files["result"]]
        environment = {**os.environ, **({"DS_ACCELERATOR": "cpu"} if is_cpu else {})}
        if subprocess.run(command, cwd=ROOT, env=environment, stdout=sys.stderr).returncode:
            return None
        intervals: list[dict[str, float]] = json.loads(files["result"].read_text())["intervals"]
        return intervals


def _report(recipe: Recipe, name: str, intervals: list[dict[str, float]] | None) -> bool:
    """Print a row; returns whether it says that the recipe fails."""
    zero = Zero.of(read_deepspeed_json(recipe.deepspeed.config))
    geometry = geometry_of(load_config(recipe.model.path))
    planned = predict_memory(Setup.of(recipe, zero, geometry, 1, SampleSize(tokens=TOKENS))).peak / GIB
    if intervals is None:
        print(f"| {name} | failed | {planned:.1f} | | |")
        return True
    samples = recipe.train.micro_batch_size * recipe.train.grad_accum_steps
    took = 1000 * min(interval["speed/s_per_step"] for interval in intervals) / samples
    peak = intervals[-1].get("memory/peak_device_gib")
    if peak is None:
        print(f"| {name} | not measured | {planned:.1f} | | {took:.1f} |")
        return False
    off = peak / planned - 1
    print(f"| {name} | {peak:.2f} | {planned:.2f} | {off:+.1%} | {took:.1f} |", flush=True)
    return abs(off) > MARGIN


if __name__ == "__main__":
    main()
