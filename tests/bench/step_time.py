"""Time and memory of stage-1 steps at a real model's geometry, with random weights; needs a GPU.

    python -m tests.bench.step_time --geometry 3b --steps 20 --micro-batch 4 --accum 2 --check-syncs

The work is one 672x672 input image (576 tokens), three 448x448 helper images (256 each), a question of about 150
tokens, four texts of about 60 tokens and K = 8: about 1,000 tokens a sample. With --check-syncs torch's debug mode
reports every synchronisation with the host between batch and optimizer step, by place; one outside DeepSpeed ends the
benchmark with exit code 1 after its report.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import tempfile
import time
import traceback
import warnings
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image

from ilvr_ds import dist
from ilvr_ds.config import recipe_from_dict
from ilvr_ds.data.collate import Collator
from ilvr_ds.data.sample import LatentStep, Sample, TextStep
from ilvr_ds.data.synthetic import TaskSpec
from ilvr_ds.demo import write_demo_model
from ilvr_ds.model.encoding import build_encoding
from ilvr_ds.training.assembly import build_step
from ilvr_ds.training.engine import init_process_group, read_deepspeed_json
from ilvr_ds.training.step import SUMS
from ilvr_ds.training.totals import Totals
from tests.bench.geometry import TEXT

VISION = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
          "fullatt_block_indexes": [7, 15, 23, 31]}  # fmt: skip


def write_geometry(folder: Path, name: str) -> None:
    """A model folder without weights: the demo's tokenizer, the sizes of Qwen2.5-VL."""
    write_demo_model(folder, TaskSpec(), "tiny")
    config = json.loads((folder / "config.json").read_text())
    text = config["text_config"]
    text.update(TEXT[name], max_window_layers=TEXT[name]["num_hidden_layers"], layer_types=None)
    text["rope_parameters"]["mrope_section"] = [16, 24, 24]
    config["tie_word_embeddings"] = text["tie_word_embeddings"] = name == "3b"
    config["vision_config"].update(VISION, out_hidden_size=TEXT[name]["hidden_size"])
    (folder / "config.json").write_text(json.dumps(config))


def draw_sample(draw: np.random.Generator, number: int) -> Sample:
    """Noise images and words, in the sizes that the module says."""

    def image(side: int) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(draw.integers(0, 255, (side, side, 3), dtype=np.uint8)).save(buffer, "JPEG")
        return buffer.getvalue()

    def words(count: int) -> str:
        return " ".join(draw.choice(["red", "circle", "shape", "row", "image", "cell", "square", "left"], count))

    steps: list[Any] = [TextStep(words(60))]
    for segment in range(3):
        steps += [LatentStep(segment), TextStep(words(60))]
    return Sample(f"noise-{number}", words(120), tuple(steps), (image(672),), tuple(image(448) for _ in range(3)), "A")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=list(TEXT), default="3b")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--accum", type=int, default=2)
    parser.add_argument("--deepspeed", default="ds_configs/zero3_single_gpu.json")
    parser.add_argument("--offload", choices=["cpu", "none"], default="cpu")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--check-syncs", action="store_true")
    parser.add_argument("--local_rank", type=int)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a GPU")
    folder = Path(tempfile.gettempdir()) / f"geometry-{options.geometry}"
    init_process_group()
    if dist.is_main() and not folder.exists():
        write_geometry(folder, options.geometry)
    dist.barrier()
    recipe = recipe_from_dict(
        {
            "run": {"name": "bench"},
            "data": {"shards": "none"},
            "model": {
                "path": str(folder), "random_init": True, "activation_checkpointing": options.checkpointing,
            },
            "teacher": {"offload": options.offload},
            "selection": {"temperature": 0.1},
            "train": {"micro_batch_size": options.micro_batch, "grad_accum_steps": options.accum},
            "deepspeed": {"config": options.deepspeed},
        }
    )  # fmt: skip
    encoding = build_encoding(recipe)
    draw = np.random.default_rng(dist.rank())
    count = options.micro_batch * options.accum
    encoded = [encoding.encoder(draw_sample(draw, n)) for n in range(count)]
    collator = Collator(encoding.special, encoding.layout, recipe.model.latent_size, 256, "packed")
    window = collator(encoded, np.arange(count), [options.micro_batch] * options.accum).pin_memory()
    start = time.perf_counter()
    step, _ = build_step(recipe, read_deepspeed_json(options.deepspeed), encoding)
    built = time.perf_counter() - start
    totals = Totals(SUMS, dist.device())
    checked = range(2, 4 if options.check_syncs else 2)
    rows = [one_step(step, window, number, totals, number in checked) for number in range(options.steps)]
    if dist.is_main():
        report(options, rows, built, window, totals)
    dist.close()
    if Syncs.ours():
        raise SystemExit(1)


def one_step(step: Any, window: Any, number: int, totals: Totals, check_syncs: bool) -> list[float]:
    """Seconds of the parts of one optimizer step: copy, vision and teacher, student, optimizer, momentum."""
    seen = Syncs(check_syncs)
    marks = [_now()]
    window = window.to(dist.device())
    torch.cuda.synchronize()
    marks.append(_now())
    with seen:
        prepared = step.prepare(window)
    marks.append(_now())
    optimizer = 0.0
    for micro in prepared.window.micro_batches:
        with seen:
            loss = step.loss(micro, prepared, number, totals)
            step.student.backward(loss * dist.world_size(), scale_wrt_gas=False)
        before = _now()
        step.student.step()
        optimizer += _now() - before
    marks.append(_now())
    step.teacher.follow()
    marks.append(_now())
    parts = [b - a for a, b in pairwise(marks)]
    return [parts[0], parts[1], parts[2] - optimizer, optimizer, parts[3], sum(parts)]


class Syncs:
    """Counts synchronisations with the host inside its block by the code that asked for them."""

    places: ClassVar[Counter[str]] = Counter()

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled

    def __enter__(self) -> None:
        if self.enabled:
            self.catcher = warnings.catch_warnings()
            self.catcher.__enter__()
            warnings.simplefilter("always")
            warnings.showwarning = self._note  # type: ignore[assignment]
            torch.cuda.set_sync_debug_mode("warn")

    def __exit__(self, *error: object) -> None:
        if self.enabled:
            torch.cuda.set_sync_debug_mode("default")
            self.catcher.__exit__(*error)

    def _note(self, message: Warning, *_: object) -> None:
        if "synchronizing CUDA operation" not in str(message):
            return
        frames = [f for f in traceback.extract_stack() if re.search("/(ilvr_ds|deepspeed|transformers)/", f.filename)]
        self.places[f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "an unknown place"] += 1

    @classmethod
    def ours(cls) -> list[str]:
        """Places outside DeepSpeed."""
        return [place for place in cls.places if "/deepspeed/" not in place]


def _now() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def report(options: Any, rows: list[list[float]], built: float, window: Any, totals: Totals) -> None:
    medians = np.median(np.array(rows[4:]), axis=0)  # warm, and not slowed by the search for synchronisations
    samples = options.micro_batch * options.accum
    sums = totals.take()
    names = ["copy", "vision+teacher", "student", "optimizer", "momentum", "step"]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {vars(options)}")
    print(
        f"up in {built:.0f} s; {window.num_tokens // samples} tokens a sample; ce {sums['ce'] / sums['supervised']:.3f}"
    )
    print("  ".join(f"{name} {1000 * value:.0f} ms" for name, value in zip(names, medians, strict=True)))
    print(f"{1000 * medians[-1] / samples:.1f} ms a sample; peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    if options.check_syncs:
        verdict = "FOUND" if Syncs.ours() else "none"
        print(f"host synchronisations between batch and optimizer step outside DeepSpeed: {verdict}")
        for place, count in Syncs.places.most_common():
            print(f"  {count / 2:.0f} a step in {place}")


if __name__ == "__main__":
    main()
