from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ilvr_ds.config import ModelConfig
from ilvr_ds.errors import UserError
from ilvr_ds.model.base_weights import linear_weights, tower_weights

LAYER = "layers.0.self_attn.q_proj"
LAYOUTS = {
    "released": ("visual.", "model."),
    "of transformers 5": ("model.visual.", "model.language_model."),
}


def folder_of(tmp_path: Path, tower: str | None, text: str) -> ModelConfig:
    tensors = {f"{text}{LAYER}.weight": torch.ones(4, 2), f"{text}{LAYER}.bias": torch.ones(4)}
    tensors |= {f"{text}embed_tokens.weight": torch.ones(8, 2), f"{text}norm.weight": torch.ones(2)}
    if tower is not None:
        tensors[f"{tower}blocks.0.weight"] = torch.ones(3)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    return ModelConfig(path=str(tmp_path))


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_each_part_by_its_released_names_whichever_layout_the_files_have(layout: str, tmp_path: Path) -> None:
    settings = folder_of(tmp_path, *LAYOUTS[layout])
    assert [name for name, _ in tower_weights(settings)] == ["visual.blocks.0.weight"]
    assert [name for name, _ in linear_weights(settings)] == [f"model.{LAYER}.weight"]


def test_a_model_without_a_tower_is_a_mistake(tmp_path: Path) -> None:
    """Catches an export without a tower, and features that count as those of any tower."""
    settings = folder_of(tmp_path, None, "model.")
    with pytest.raises(UserError, match="holds no weights of a vision tower"):
        list(tower_weights(settings))


def test_a_file_that_is_no_safetensors_is_a_mistake(tmp_path: Path) -> None:
    """As git leaves it where large files were not fetched."""
    settings = folder_of(tmp_path, "visual.", "model.")
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match=r"model\.path: .*model\.safetensors cannot be read"):
        list(tower_weights(settings))
