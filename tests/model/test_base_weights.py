from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ilvr_ds.config import ModelConfig
from ilvr_ds.errors import UserError
from ilvr_ds.model.base_weights import check_weights, linear_weights, tower_weights

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
    with pytest.raises(UserError, match=r"model\.path: the weights at .* cannot be read \(model\.safetensors: "):
        list(tower_weights(settings))


def test_adapters_beside_the_weights_are_a_mistake(tmp_path: Path) -> None:
    """Catches another base than the one that is named: transformers follows the adapters to theirs, without a word."""
    settings = folder_of(tmp_path, "visual.", "model.")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "/another"}')
    for read in (lambda: check_weights(settings.path), lambda: list(tower_weights(settings))):
        with pytest.raises(UserError, match=r"model\.path: .*adapter_config\.json stands for adapters on another base"):
            read()


FIRST, SECOND = "visual.blocks.0.weight", f"model.{LAYER}.weight"
FILES = ("model-00001-of-00002", "model-00002-of-00002")


def sharded(folder: Path, kind: str, first: dict[str, float], second: dict[str, float], index: dict[str, int]) -> str:
    """Two files with weights of one value each, and an index that says in which file each name lies."""
    for file, content in zip(FILES, (first, second), strict=True):
        tensors = {name: torch.full((2, 2), value) for name, value in content.items()}
        if kind == "bin":
            torch.save(tensors, folder / f"{file}.bin".replace("model-", "pytorch_model-"))
        else:
            save_file(tensors, folder / f"{file}.safetensors")
    names = {name: f"{FILES[number]}.{kind}" for name, number in index.items()}
    stem = "model"
    if kind == "bin":
        names = {name: file.replace("model-", "pytorch_model-") for name, file in names.items()}
        stem = "pytorch_model"
    (folder / f"{stem}.{kind}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return str(folder)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_files_that_the_index_does_not_name_are_not_read(tmp_path: Path, kind: str) -> None:
    """A tower of zeros, left by an older download, was exported in place of the real one."""
    path = sharded(tmp_path, kind, {FIRST: 1.0}, {SECOND: 2.0}, {FIRST: 0, SECOND: 1})
    left_over = {FIRST: torch.zeros(2, 2), SECOND: torch.zeros(2, 2)}
    if kind == "bin":
        torch.save(left_over, tmp_path / "pytorch_model-00003-of-00003.bin")
    else:
        save_file(left_over, tmp_path / "model-00003-of-00003.safetensors")
    settings = ModelConfig(path=path)
    assert [(name, tensor.mean().item()) for name, tensor in tower_weights(settings)] == [(FIRST, 1.0)]
    assert [(name, tensor.mean().item()) for name, tensor in linear_weights(settings)] == [(SECOND, 2.0)]
    check_weights(path)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("again", [FIRST, f"model.{FIRST}"])
def test_a_weight_in_two_files_is_a_mistake(tmp_path: Path, kind: str, again: str) -> None:
    """transformers takes the last one in silence."""
    path = sharded(tmp_path, kind, {FIRST: 1.0}, {SECOND: 2.0, again: 0.0}, {FIRST: 0, SECOND: 1})
    for reads in (lambda: check_weights(path), lambda: list(tower_weights(ModelConfig(path=path)))):
        with pytest.raises(UserError, match=rf"model-00002-of-00002.{kind}: holds {FIRST} again"):
            reads()


def test_an_index_that_does_not_fit_its_files_is_a_mistake(tmp_path: Path) -> None:
    path = sharded(tmp_path, "safetensors", {FIRST: 1.0}, {SECOND: 2.0}, {FIRST: 1, SECOND: 1})
    with pytest.raises(UserError, match=rf"lacks 1 weights that the index places there, the first {FIRST}"):
        check_weights(path)
    (tmp_path / f"{FILES[1]}.safetensors").unlink()
    with pytest.raises(UserError, match=r"cannot be read \(model-00002-of-00002.safetensors: "):
        check_weights(path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weights": 1}')
    with pytest.raises(UserError, match="is no index of weights"):
        check_weights(path)


def test_two_layouts_at_once_are_a_mistake(tmp_path: Path) -> None:
    """transformers reads model.safetensors, other programs the index."""
    path = sharded(tmp_path, "safetensors", {FIRST: 1.0}, {SECOND: 2.0}, {FIRST: 0, SECOND: 1})
    save_file({FIRST: torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"holds model.safetensors and model.safetensors.index.json"):
        check_weights(path)


def test_a_folder_without_weights_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be read \(neither model.safetensors nor an index"):
        check_weights(str(tmp_path))
