"""What `ilvr-ds audit` costs: minutes of each of its tests at a real model's size, with random weights.

    python -m tests.bench.audit_cost                 # 7B on one GPU, 64 samples in one batch, stated for 500
    python -m tests.bench.audit_cost --cpu           # the demo's size: ratios only

The audit is the product's own command, in this process, with clocks around its tests. Samples are drawn: one 672x672
input image (576 tokens), three 448x448 helper images, a question of about 150 tokens with four options, two groups.
Random weights never open a segment and never end, so the head is planted (chain_model.py): every answer is as long as
--max-new-tokens, with a segment of K latents after each --chain words; real answers of a batch end at different times,
and the batch goes on until the last one. A batch takes a whole answer's steps however many samples it has, so what is
scaled to 500 samples is the time of a batch; what an audit does a fixed number of times is counted once.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import torch

from ilvr_ds import cli
from ilvr_ds.audit import command, passes
from ilvr_ds.audit.readings.retrieval import OTHERS
from ilvr_ds.audit.readings.targets import TargetChooser
from ilvr_ds.data.sample import Sample, TextStep
from ilvr_ds.evaluation.results import Results
from ilvr_ds.ingest.pack import pack_samples
from tests.bench.chain_model import write_chain_model
from tests.bench.geometry import TEXT
from tests.bench.noise import SIZES, draw_samples

LETTERS = "ABCD"
STATED = 500
"""Samples that the table speaks of"""


class Clock:
    """Seconds that named parts of the audit took; a part inside another counts for itself alone."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inside: list[float] = []

    def wrap(self, owner: Any, name: str, part: str) -> None:
        """Time the calls of `owner.name`."""
        function = getattr(owner, name)

        @wraps(function)
        def timed(*arguments: Any, **named: Any) -> Any:
            return self(part, lambda: function(*arguments, **named))

        setattr(owner, name, timed)

    def __call__(self, part: str, work: Callable[[], Any]) -> Any:
        """Do `work` on this part's time."""
        self._inside.append(0.0)
        start = _now()
        result = work()
        took = _now() - start
        self.seconds[part] += took - self._inside.pop()
        if self._inside:
            self._inside[-1] += took
        if took > 1:  # what is stopped leaves something
            print(f"{part}: {self.seconds[part]:.1f} s so far", file=sys.stderr, flush=True)
        return result


def main() -> None:
    options = _options()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        start = time.perf_counter()
        device = torch.device("cpu" if options.cpu else "cuda")
        write_chain_model(folder / "model", options.geometry, options.chain, options.latent_size, device)
        sizes = SIZES["demo" if options.geometry == "demo" else "real"]
        pack_samples(_samples(sizes, options.samples), folder / "shards")
        print(f"model and data: {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
        clock = _clocks()
        arguments = [
            "audit", "--model", folder / "model", "--shards", folder / "shards", "--benchmark", "option-letter",
            "--batch-size", options.batch_size, "--max-new-tokens", options.max_new_tokens, "--output", folder / "out",
        ]  # fmt: skip
        with redirect_stdout(sys.stderr):
            code = clock("the rest", lambda: cli.main([str(argument) for argument in arguments]))
        if code or len(Results(folder / "out").lines()) < options.samples:  # a signal ends an audit with code 0
            raise SystemExit("the audit did not end; what it took so far is above")
        print("\n".join(_table(clock.seconds, folder / "out", options)))


def _options() -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=TEXT, default="7b")
    parser.add_argument("--samples", type=int, default=64, help="that are audited (default 64)")
    parser.add_argument("--batch-size", type=int, default=64, help="as of `ilvr-ds audit` (default 64)")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="the length of every answer (default 128)")
    parser.add_argument("--chain", type=int, default=30, help="words between two segments (default 30)")
    parser.add_argument("--latent-size", type=int, default=8, help="K (default 8)")
    parser.add_argument("--folder", help="where model and data are written for a while (default: temporary files)")
    parser.add_argument("--cpu", action="store_true", help="the demo's model on the CPU")
    options = parser.parse_args()
    if options.cpu:
        options.geometry = "demo"
    return options


def _samples(sizes: Any, count: int) -> Iterator[Sample]:
    """Noise with options, the answers in turn, so that every sample has a donor; two groups."""
    for number, sample in enumerate(draw_samples("comt", sizes, count)):
        letter = LETTERS[number % 4]
        yield replace(
            sample,
            question=f"{sample.question} A) red B) circle C) row D) left",
            steps=(*sample.steps[:-1], TextStep(f"The answer is ({letter})")),
            answer=letter,
            group="first" if number % 8 < 4 else "second",
        )


def _clocks() -> Clock:
    """Around each test; what no clock knows is the rest."""
    clock = Clock()
    clock.wrap(command, "prepare", "loading")
    clock.wrap(command, "_retrieval_pool", "pool")
    clock.wrap(passes.OwnPass, "answer", "own answers")
    clock.wrap(TargetChooser, "__call__", "inside")
    clock.wrap(command.Retrieval, "__call__", "inside")
    clock.wrap(passes, "attention_shares", "attention")
    clock.wrap(passes.ChangedPass, "_replace", "replacement")
    clock.wrap(passes.ChangedPass, "_swap", "donor")
    clock.wrap(passes.ChangedPass, "_bar", "barred")
    clock.wrap(command.Finish, "__call__", "page")
    return clock


def _table(seconds: dict[str, float], output: Path, options: Any) -> list[str]:
    """Minutes of each test for STATED samples."""
    lines = Results(output, "own").lines()
    tokens = sum(len(line["tokens"]) for line in lines) / len(lines)
    segments = sum(sum(n == options.latent_size for n in line["steps"]) for line in lines) / len(lines)
    batches = math.ceil(options.samples / options.batch_size)
    factor = math.ceil(STATED / options.batch_size) / batches
    pool = seconds["pool"] * (OTHERS + 1) / min(OTHERS + 1, options.samples)
    minutes = {
        "own answers": seconds["own answers"] * factor,
        "replacement": seconds["replacement"] * factor,
        "donor": seconds["donor"] * factor,
        "inside": seconds["inside"] * factor + pool + seconds["attention"],
        "barred": seconds["barred"] * factor,
        "prompts anew": seconds["the rest"] * factor,
        "loading, page": seconds["loading"] + seconds["page"],
    }
    minutes["all"] = sum(minutes.values())
    machine = "CPU" if options.cpu else torch.cuda.get_device_name()
    return [
        f"{machine}, torch {torch.__version__}, {options.geometry}, random weights; {len(lines)} samples measured in "
        f"{batches} batches of at most {options.batch_size}; answers of {tokens:.0f} tokens with {segments:.1f} "
        f"whole segments of {options.latent_size} latents",
        "",
        f"| part | measured s | minutes for {STATED} samples |",
        "|---|---|---|",
        *(f"| {name} | {_measured(seconds, name):.1f} | {value / 60:.1f} |" for name, value in minutes.items()),
    ]


def _measured(seconds: dict[str, float], name: str) -> float:
    parts = {
        "inside": ("inside", "pool", "attention"),
        "prompts anew": ("the rest",),
        "loading, page": ("loading", "page"),
        "all": tuple(seconds),
    }
    return sum(seconds[part] for part in parts.get(name, (name,)))


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
