"""A model in the layout of the released checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def old_layout(model: Path, folder: Path, kind: str) -> Path:
    """A model in two shards with the names that transformers before 4.52 wrote."""
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    old = {
        name.replace("model.visual.", "visual.").replace("model.language_model.", "model."): tensor
        for name, tensor in weights.items()
    }
    assert "model.embed_tokens.weight" in old and any(name.startswith("visual.") for name in old)
    names, stem = sorted(old), "pytorch_model" if kind == "bin" else "model"
    place = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"{stem}-{number:05d}-of-00002.{kind}"
        tensors = {name: old[name].clone() for name in part}
        if kind == "bin":
            torch.save(tensors, folder / file)
        else:
            save_file(tensors, folder / file, metadata={"format": "pt"})
        place |= dict.fromkeys(part, file)
    (folder / f"{stem}.{kind}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place}))
    return folder
