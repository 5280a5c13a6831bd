"""What stands beside exported weights: in the words of transformers 4, and understood by 5 as it was meant."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import AutoConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from ilvr_ds.data.images import ImageEncoder
from ilvr_ds.data.tokens import load_tokenizer
from ilvr_ds.demo.tiny import build_tiny_model
from tests.evaluation.exporting import export_base

YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 4096, "mrope_section": [2, 3, 3]}


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As transformers 5 writes it."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    build_tiny_model(folder, texts=["the answer is B"] * 3)
    return folder


def copy_with(base: Path, folder: Path, file: str, **changes: Any) -> Path:
    shutil.copytree(base, folder)
    path = folder / file
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | changes))
    return folder


@pytest.mark.parametrize("rope", ["default", "yarn"])
def test_the_configuration_is_flat_and_means_the_same(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rope: str
) -> None:
    text = json.loads((tiny_model / "config.json").read_text())["text_config"]
    if rope == "yarn":
        text["rope_parameters"] = {"rope_theta": 5000.0, **YARN}
    base = copy_with(tiny_model, tmp_path / "base", "config.json", text_config=text)
    written = export_base(base, tmp_path / "out", monkeypatch)
    content = json.loads((written / "config.json").read_text())
    assert not {"text_config", "rope_parameters", "dtype"} & set(content)
    assert (content["hidden_size"], content["model_type"], content["torch_dtype"]) == (64, "qwen2_5_vl", "float32")
    kind = {"default": "mrope", "yarn": "yarn"}[rope]
    assert (content["rope_scaling"]["type"], content["rope_scaling"]["mrope_section"]) == (kind, [2, 3, 3])
    assert "rope_type" not in content["rope_scaling"]  # beside "type" it may not differ, for vLLM
    assert content["rope_theta"] == {"default": 1e6, "yarn": 5000.0}[rope]
    before, after = AutoConfig.from_pretrained(base), AutoConfig.from_pretrained(written)
    old, new = before.text_config.to_dict(), after.text_config.to_dict()
    new["rope_parameters"].pop("type")
    assert {key: new[key] for key in old if key != "dtype"} == {key: old[key] for key in old if key != "dtype"}
    assert after.vision_config.to_dict() | {"dtype": None} == before.vision_config.to_dict() | {"dtype": None}
    assert str(after.dtype) == "torch.float32" and after.latent_size == 4


def test_the_tokenizer_speaks_of_its_special_tokens_as_both_versions_read_them(
    tiny_model: Path, golden_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, base in {"tiny": tiny_model, "golden": golden_model}.items():
        written = export_base(base, tmp_path / name / "out", monkeypatch)
        content = json.loads((written / "tokenizer_config.json").read_text())
        assert "extra_special_tokens" not in content and content["additional_special_tokens"]
        assert content["tokenizer_class"] in ("Qwen2Tokenizer", "PreTrainedTokenizerFast")
        before, special = load_tokenizer(str(base))
        after, special_after = load_tokenizer(str(written), add_latent_tokens=False)
        assert special_after == special and after.get_vocab() == before.get_vocab()
        assert type(after) is type(before) and set(after.all_special_tokens) == set(before.all_special_tokens)
        assert content["chat_template"] == after.chat_template == before.chat_template
        text = "the answer<|latent_start|> 12<|im_end|>\n"
        assert after(text)["input_ids"] == before(text)["input_ids"]


@pytest.mark.parametrize("nested", [True, False])
def test_the_runs_image_limit_outranks_the_bases(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nested: bool
) -> None:
    """transformers 5 writes processor_config.json with the image processor inside, which outranks the file beside it:
    generation saw an image as 441 tokens where training had seen 4."""
    settings = json.loads((tiny_model / "preprocessor_config.json").read_text())
    inside = {"image_processor": settings} if nested else {}
    processor = {"processor_class": "Qwen2_5_VLProcessor", **inside}
    base = copy_with(tiny_model, tmp_path / "base", "processor_config.json", **processor)
    if nested:
        (base / "preprocessor_config.json").unlink()
    written = export_base(base, tmp_path / "out", monkeypatch, "data.max_image_pixels=5000")
    image = Image.new("RGB", (600, 600))
    png = io.BytesIO()
    image.save(png, "PNG")
    assert ImageEncoder(str(written), 2**26).grid(png.getvalue()) == (4, 4)
    grid = Qwen2VLImageProcessorPil.from_pretrained(written)([image], return_tensors="pt")["image_grid_thw"]
    assert grid.tolist() == [[1, 4, 4]]
    assert json.loads((written / "processor_config.json").read_text()) == {"processor_class": "Qwen2_5_VLProcessor"}
    content = json.loads((written / "preprocessor_config.json").read_text())
    assert content["max_pixels"] == content["size"]["longest_edge"] == 5000
