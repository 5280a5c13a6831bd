"""Looks at samples of the demo on one rank, for test_pictures."""

from __future__ import annotations

from pathlib import Path

from ilvr_ds.config import load_recipe
from ilvr_ds.pictures.views import SampleView
from ilvr_ds.training.assembly import assemble
from ilvr_ds.training.engine import init_process_group


def views(demo: str) -> list[SampleView]:
    init_process_group()
    root = Path(demo)
    overrides = [
        f"run.output_dir={root / 'looking'}", f"data.shards={root / 'train'}", f"data.eval_shards={root / 'held_out'}",
        f"model.path={root / 'model'}", "evaluation.max_samples=8", "tracking.uri=http://127.0.0.1:9",
    ]  # fmt: skip
    parts = assemble(load_recipe("launch/recipes/demo.yaml", overrides), Path("launch/recipes/demo.yaml"))
    assert parts.pictures.gaze is not None
    found = parts.pictures.gaze()
    parts.tracker.close("KILLED", timeout_s=0)
    return found
