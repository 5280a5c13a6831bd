"""Import of a released checkpoint: flat old configuration, old key names, .bin or safetensors, exact row count."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLForConditionalGeneration

from ilvr_ds.errors import UserError
from ilvr_ds.generation.loading import load_reasoner
from tests.evaluation.released import old_layout

if TYPE_CHECKING:
    from tests.golden_set import GoldenSet


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_the_released_layout_loads(golden: GoldenSet, golden_model: Path, tmp_path: Path, kind: str) -> None:
    folder = old_layout(golden_model, tmp_path / "old", kind)
    reasoner = load_reasoner(str(folder), torch.device("cpu"), precision="fp32")
    rows = reasoner.model.get_input_embeddings().weight.shape[0]
    assert rows == len(reasoner.encoder.tokenizer), "exactly the tokenizer's rows"
    assert reasoner.latent_size == golden.settings["latent_size"]
    stock = Qwen2_5_VLForConditionalGeneration.from_pretrained(golden_model, dtype=torch.float32)
    expected = stock.state_dict()
    for name, value in reasoner.model.state_dict().items():
        assert torch.equal(value, expected.pop(name)), name
    for name, value in reasoner.tower.tower.state_dict().items():
        assert torch.equal(value, expected.pop(f"model.visual.{name}")), name
    assert not expected


def test_missing_weights_are_a_mistake(golden_model: Path, tmp_path: Path) -> None:
    """transformers would draw them at random and only warn."""
    folder = shutil.copytree(golden_model, tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 missing, the first lm_head.weight"):
        load_reasoner(str(folder), torch.device("cpu"))


def test_a_model_that_does_not_know_its_latent_size_needs_to_be_told(golden_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(golden_model, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    del config["latent_size"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="holds no latent_size; give --latent-size"):
        load_reasoner(str(folder), torch.device("cpu"))
    assert load_reasoner(str(folder), torch.device("cpu"), latent_size=5).latent_size == 5


def test_an_image_limit_below_the_models_minimum_is_a_mistake_of_the_option(golden_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(golden_model, tmp_path / "m")
    content = json.loads((folder / "preprocessor_config.json").read_text()) | {"min_pixels": 100_352}
    (folder / "preprocessor_config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"--max-image-pixels: at most 50176 pixels, but .* smaller than 100352"):
        load_reasoner(str(folder), torch.device("cpu"), max_image_pixels=50_176)


def test_a_weight_in_two_files_is_a_mistake(golden_model: Path, tmp_path: Path) -> None:
    """transformers takes the last one in silence."""
    folder = old_layout(golden_model, tmp_path / "old", "safetensors")
    file = folder / "model-00002-of-00002.safetensors"
    name, tensor = next(iter(load_file(folder / "model-00001-of-00002.safetensors").items()))
    save_file({**load_file(file), name: torch.zeros_like(tensor)}, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"--model: .*model-00002-of-00002.safetensors: holds .* again"):
        load_reasoner(str(folder), torch.device("cpu"))
