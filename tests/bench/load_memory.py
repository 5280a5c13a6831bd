"""Host memory of a node while its ranks load a model, by number of ranks; runs on the CPU.

    python -m tests.bench.load_memory --ranks 1 2 4

A random model of 136 M parameters (545 MB in fp32, in shards of 100 MB) is loaded as training does, under ZeRO-3 and
under ZeRO-2. Counted is anonymous memory above that of the imported libraries, summed over the ranks, at its peak and
after loading: pages of the file that are mapped belong to all processes of a node, and can be dropped.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.integrations import HfDeepSpeedConfig

from ilvr_ds.config import ModelConfig
from ilvr_ds.demo.tiny import TinySize, build_tiny_model
from ilvr_ds.engine.networks import init_process_group
from ilvr_ds.model.student import load_student
from tests.ranks import free_port, rank_environment

SIZE = TinySize(1024, 2816, 12, 16, 4, vision_hidden_size=32, vision_heads=2, vocab_size=512)
PAUSE_S = 0.005


def anonymous_mb() -> float:
    """Of this process, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024 / 1e6


@contextmanager
def peak() -> Iterator[list[float]]:
    """The largest `anonymous_mb` within the block; valid after it."""
    found, ended = [anonymous_mb()], threading.Event()

    def watch() -> None:
        while not ended.wait(PAUSE_S):
            found[0] = max(found[0], anonymous_mb())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()


def load(folder: str, stage: int) -> dict[str, float]:
    """On a rank: load the model; MB above those before, at the peak and after, and seconds."""
    init_process_group()
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage}}
    birth = HfDeepSpeedConfig(settings) if stage == 3 else None
    before, start = anonymous_mb(), time.monotonic()
    with peak() as found:
        model = load_student(ModelConfig(path=folder), torch.float32, 0)
    seconds = time.monotonic() - start
    del birth
    kept = anonymous_mb() - before
    del model
    return {"peak": found[0] - before, "kept": kept, "seconds": seconds}


def measure(folder: Path, stage: int, world: int) -> list[dict[str, float]]:
    """The results of all ranks."""
    port = free_port()
    command = [sys.executable, "-m", "tests.bench.load_memory", "--rank-of", str(folder), "--stage", str(stage)]
    # a real model's weights are too large for malloc to keep when they are freed (above 32 MB); these would not be
    malloc = {"MALLOC_MMAP_THRESHOLD_": str(2**18)}
    ranks = [
        subprocess.Popen(command, env=rank_environment(rank, world, port) | malloc, stdout=subprocess.PIPE, text=True)
        for rank in range(world)
    ]
    outputs = [rank.communicate()[0] for rank in ranks]
    assert not any(rank.returncode for rank in ranks)
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def write_model(folder: Path, size: TinySize = SIZE) -> float:
    """Write a model in several files; returns their size in MB."""
    build_tiny_model(folder, texts=["a few words"], size=size)
    model: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    model.save_pretrained(folder, max_shard_size="100MB")
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rank-of", help=argparse.SUPPRESS)
    parser.add_argument("--stage", type=int, default=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_of:
        print(json.dumps(load(options.rank_of, options.stage)), flush=True)
        os._exit(0)  # gloo's threads would hold the interpreter
    with tempfile.TemporaryDirectory() as name:
        print(f"a model of {write_model(Path(name)):.0f} MB; MB of all ranks together")
        print("| ZeRO | ranks | peak | rank 0's part of it | afterwards | seconds |\n|---|---|---|---|---|---|")
        for stage in (3, 2):
            for world in options.ranks:
                found = measure(Path(name), stage, world)
                total = {key: sum(rank[key] for rank in found) for key in ("peak", "kept")}
                seconds = max(rank["seconds"] for rank in found)
                row = (stage, world, *(f"{mb:.0f}" for mb in (total["peak"], found[0]["peak"], total["kept"])))
                print("|", " | ".join(map(str, row)), "|", f"{seconds:.0f}", "|", flush=True)


if __name__ == "__main__":
    main()
