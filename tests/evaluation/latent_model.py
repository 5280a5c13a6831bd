"""A tiny random model whose answers open a segment of latents at once."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from ilvr_ds.data.sample import Sample
from ilvr_ds.data.tokens import load_tokenizer
from ilvr_ds.demo.tiny import build_tiny_model
from ilvr_ds.generation.generate import Generator
from ilvr_ds.generation.loading import load_reasoner
from ilvr_ds.generation.settings import GenerationSettings
from tests.data.packing import image_bytes

LATENT_SIZE = 3


def build_latent_model(folder: Path, question: str) -> Path:
    """Write it to `folder`: what it likes to say first to `question` and a picture is latent_start."""
    build_tiny_model(folder, texts=[question] * 3)
    return let_open_a_segment(folder, Sample("s", question, (), (image_bytes(size=(60, 40)),)))


def let_open_a_segment(folder: Path, sample: Sample) -> Path:
    """Give the model in `folder` latent tokens; what it likes to say first to `sample` becomes latent_start."""
    tokenizer, special = load_tokenizer(str(folder))
    tokenizer.save_pretrained(folder)
    stock = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    stock.config.latent_size = LATENT_SIZE
    stock.save_pretrained(folder)
    reasoner = load_reasoner(str(folder), torch.device("cpu"), "fp32")
    [answer] = Generator(reasoner, GenerationSettings(max_new_tokens=1))([reasoner.encoder.prompt(sample)]).answers
    weight = stock.lm_head.weight.data
    weight[special.latent_start] = 1.02 * weight[answer.tokens[0]]
    stock.save_pretrained(folder)
    return folder
