"""An export without a training run before it: of a checkpoint that holds what the base has."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, Qwen2_5_VLForConditionalGeneration

from ilvr_ds.checkpoint.files import checksum_of
from ilvr_ds.config import load_recipe
from ilvr_ds.evaluation import export as module
from ilvr_ds.model.layers.adapters import add_adapters
from ilvr_ds.owner import Owner
from tests.ranks import ROOT


def abandoned(folder: Path) -> Path:
    """What a killed export leaves: half of a model, and the name of its process."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    folder.mkdir()
    (folder / "part-0").write_bytes(bytes(100))
    owner = {"host": "here", "process": child.pid, "started": 1, "job": None, "machine": Owner().machine}
    (folder / "writer.json").write_text(json.dumps(owner))
    return folder


def export_base(
    base: Path, to: Path, monkeypatch: pytest.MonkeyPatch, *changes: str, adapters: str = "merge", random: bool = False
) -> Path:
    """Export `base` to `to` as if a run with `changes` had ended where it began; random: adapters are not zero."""
    recipe = load_recipe(ROOT / "launch/recipes/demo.yaml", [f"model.path={base}", "train.precision=fp32", *changes])
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    if recipe.model.lora_rank:
        add_adapters(model.model.language_model, recipe.model)
    model.model.visual = None
    weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for name, tensor in weights.items():
        if random and "lora_" in name:
            tensor.normal_(std=0.05, generator=torch.Generator().manual_seed(len(name)))
    checkpoint = to.parent / "run/checkpoints/step-00000002"
    checkpoint.mkdir(parents=True, exist_ok=True)
    state = json.loads(json.dumps({"step": 2, "recipe": dataclasses.asdict(recipe), "files": {}}))
    (checkpoint / "state.json").write_text(json.dumps(state | {"checksum": checksum_of(state)}))
    monkeypatch.setattr(module, "read_student_weights", lambda path: weights)
    module.export(checkpoint, to, adapters, None, overwrite=False)
    return to


def tied(base: Path, folder: Path) -> Path:
    """The same with an embedding that is the head as well, as the 3B release has it."""
    shutil.copytree(base, folder)
    config = AutoConfig.from_pretrained(folder)
    config.tie_word_embeddings = True
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(base, config=config, dtype=torch.float32)
    with torch.no_grad():  # as large as an embedding, it would say the last token again whatever stands before
        model.get_input_embeddings().weight.mul_(0.03)
    model.save_pretrained(folder)
    return folder
