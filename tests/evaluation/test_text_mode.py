"""An export as a plain model: stock `generate`, with the tokens forbidden that its card names, says what we say."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from ilvr_ds.data.sample import Sample
from ilvr_ds.data.turns import prompt_turns
from ilvr_ds.demo.tiny import build_tiny_model
from ilvr_ds.generation.context import Context
from ilvr_ds.generation.generate import Generator
from ilvr_ds.generation.loading import load_reasoner
from ilvr_ds.generation.settings import GenerationSettings
from tests.evaluation.exporting import export_base, tied
from tests.evaluation.questions import LIMIT, questions

MAX_TOKENS = 24


def stock_inputs(folder: Path, sample: Sample) -> dict[str, Any]:
    """Of stock `generate`, by the export's own tokenizer, template and image processor."""
    tokenizer, images = AutoTokenizer.from_pretrained(folder), Qwen2VLImageProcessorPil.from_pretrained(folder)
    text = tokenizer.apply_chat_template(prompt_turns(sample), tokenize=False, add_generation_prompt=True)
    pixels: dict[str, Any] = {}
    if sample.input_images:
        pixels = dict(images([Image.open(io.BytesIO(data)) for data in sample.input_images], return_tensors="pt"))
        counts = iter(pixels["image_grid_thw"].prod(1).tolist())
        text = re.sub(r"<\|image_pad\|>", lambda match: match[0] * (next(counts) // images.merge_size**2), text)
    ids = tokenizer(text, return_tensors="pt")
    is_image = ids["input_ids"] == tokenizer.convert_tokens_to_ids("<|image_pad|>")
    return {**ids, **pixels, "mm_token_type_ids": is_image.int()}


@pytest.mark.parametrize("name", ["plain", "tied", "qwen3_vl"])
def test_stock_generate_answers_in_text(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = "qwen3_vl" if name == "qwen3_vl" else "qwen2_5_vl"
    build_tiny_model(tmp_path / "base", texts=["How many remain?"] * 3, family=family)
    base = tied(tmp_path / "base", tmp_path / "tied-base") if name == "tied" else tmp_path / "base"
    folder = export_base(base, tmp_path / "model", monkeypatch, LIMIT)
    card = (folder / "README.md").read_text()
    forbidden = json.loads(card.partition("suppress_tokens=")[2].partition(")")[0])
    bias = json.loads(card.partition('"logit_bias": ')[2].partition("`")[0])
    config = json.loads((folder / "config.json").read_text())
    assert forbidden == [config[f"latent_{key}_id"] for key in ("token", "start", "end")] == [int(id) for id in bias]
    assert set(bias.values()) == {-100}

    reasoner = load_reasoner(str(folder), torch.device("cpu"), "fp32")
    settings = GenerationSettings(max_new_tokens=MAX_TOKENS, forbidden=(reasoner.special.latent_start,))
    samples = questions(32 if name == "qwen3_vl" else 28)
    prompts = [reasoner.encoder.prompt(sample) for sample in samples]
    answers = [list(answer.tokens) for answer in Generator(reasoner, settings)(prompts).answers]
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    how = {"max_new_tokens": MAX_TOKENS, "do_sample": False, "suppress_tokens": forbidden}
    first = []
    for sample, prompt, answer in zip(samples, prompts, answers, strict=True):
        inputs = stock_inputs(folder, sample)
        found = model.generate(**inputs, **how, return_dict_in_generate=True, output_logits=True)
        assert found.sequences[0].tolist() == [*prompt.input_ids.tolist(), *answer]
        first.append(found.logits[0][0])
        with torch.no_grad():
            ours = reasoner.model.lm_head(Context(reasoner, [prompt], 1).prefill())[0]
        torch.testing.assert_close(first[-1], ours, atol=2e-5, rtol=0)
    assert (first[1] - first[2]).abs().max() > 1e-3  # of two images under one question
