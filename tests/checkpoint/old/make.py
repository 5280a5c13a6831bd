"""Makes run.tar.xz with the code of an older commit; see README.md here."""

from __future__ import annotations

import json
import os
import sys
import tarfile
import tempfile
from itertools import islice
from pathlib import Path

from ilvr_ds.data.synthetic import TaskSpec, draw_samples, write_task
from ilvr_ds.model.tiny import TinySize, build_tiny_model

from ilvr_ds.cli import main
from ilvr_ds.demo import _texts

SIZE = TinySize(16, 32, 1, 1, 1, vision_hidden_size=8, vision_heads=1, vocab_size=300)
SAVED, STEPS, SAMPLES = 2, 5, 12
"""Three steps an epoch: what is left crosses into the second."""
NAMES = ("loss/ce", "loss/alignment", "loss/contrastive", "grad/norm", "lr", "teacher/drift")


def make(code: Path, archive: Path) -> None:
    """Train STEPS steps in an empty folder; keep model, data, recipe, the checkpoint after SAVED, and the losses."""
    spec = TaskSpec()
    texts = [text for s in islice(draw_samples(spec, 0, "train", 64), 64) for text in _texts(s)]
    build_tiny_model(Path("model"), texts=texts, size=SIZE)
    write_task(Path("task"), spec, 0, SAMPLES, 0)
    recipe = (code / "launch/recipes/demo.yaml").read_text().replace("../../ds_configs", str(code / "ds_configs"))
    Path("recipe.yaml").write_text(recipe)
    changes = {
        "run.output_dir": ".", "model.path": "model", "data.shards": "train", "data.eval_shards": "null",
        "data.lanes": 4, "data.max_tokens": 1024, "train.micro_batch_size": 4, "train.max_steps": STEPS,
        "optim.warmup_steps": 2, "checkpoint.every_steps": SAVED, "checkpoint.keep_last": 0,
        "tracking.every_steps": 1, "tracking.picture_samples": 0,
    }  # fmt: skip
    sets = [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
    pack = ["pack", "--input", "task/train.jsonl", "--output", "train", "--config", "recipe.yaml"]
    assert main([*pack, *sets]) == main(["train", "--config", "recipe.yaml", *sets]) == 0
    Path("recipe.yaml").write_text((code / "launch/recipes/demo.yaml").read_text())
    lines = [json.loads(line) for line in Path("demo/metrics.jsonl").read_text().splitlines()]
    found = {line["step"]: line["metrics"] for line in lines if "loss/ce" in line.get("metrics", {})}
    left = {step: {name: metrics[name] for name in NAMES} for step, metrics in found.items() if step > SAVED}
    Path("expected.json").write_text(json.dumps({"changes": changes, "metrics": left}, indent=1))
    with tarfile.open(archive, "w:xz", preset=9) as tar:
        for name in ("recipe.yaml", "expected.json", "model", "train", f"demo/checkpoints/step-{SAVED:08d}"):
            tar.add(name)


if __name__ == "__main__":
    target = Path(__file__).parent.absolute() / "run.tar.xz"
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        make(Path(sys.argv[1]), target)
