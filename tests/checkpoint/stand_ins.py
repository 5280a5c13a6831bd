"""Checkpoints without DeepSpeed: a stand-in hands over one file where the student's engine hands over its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ilvr_ds.checkpoint.files import checksum_of
from ilvr_ds.checkpoint.writer import CheckpointWriter
from ilvr_ds.config import CheckpointConfig, Recipe, RunConfig
from ilvr_ds.distill.ema import MomentumShards

NAMES = ["layers.0.weight", "norm.weight"]


class Student:
    """Keeps one number where an engine keeps a network."""

    def __init__(self, number: int = 0) -> None:
        self.number = number
        self.checkpoint_engine: Any = None

    def save_checkpoint(self, folder: str, tag: str, save_latest: bool) -> None:
        assert not save_latest, "a file `latest` would name a folder that is renamed"
        self.checkpoint_engine.save({"number": torch.tensor(self.number)}, f"{folder}/{tag}/number.pt")

    def load_checkpoint(self, folder: str, tag: str) -> tuple[str | None, dict[str, Any]]:
        file = Path(folder) / tag / "number.pt"
        if not file.exists():
            return None, {}
        self.number = int(torch.load(file)["number"])
        return str(file), {}


def shards(value: float) -> MomentumShards:
    values = [torch.full((5,), value), torch.full((2,), -value)]
    return MomentumShards([v.clone() for v in values], values, 0.9, torch.device("cpu"))


def save(folder: Path, step: int, value: float = 1.0, background: bool = True) -> Path:
    state = {"loader": {"step": step, "samples per step": 1}, "recipe": recipe(folder, "auto").to_dict()}
    writer = CheckpointWriter(folder, Student(step), NAMES, shards(value), 0, 0, background)
    assert writer.start(step, {**state, "zero_stage": 3, "layout": {"sub_group_size": 10**9}}) == background
    path, error = writer.finish()
    assert path is not None, error
    return path


def make_folder(path: Path) -> None:
    """A checkpoint without files."""
    path.mkdir(parents=True)
    state: dict[str, Any] = {"files": {}}
    (path / "state.json").write_text(json.dumps(state | {"checksum": checksum_of(state)}))


def recipe(folder: Path, resume: str) -> Recipe:
    run = folder.parent
    return Recipe(run=RunConfig(name=run.name, output_dir=str(run.parent)), checkpoint=CheckpointConfig(resume=resume))
