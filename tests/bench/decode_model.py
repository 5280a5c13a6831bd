"""The model with random weights, and the prompts, of tests/bench/decode.py."""

from __future__ import annotations

import dataclasses
import io
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from ilvr_ds.data.images import ImageEncoder
from ilvr_ds.data.sample import Sample
from ilvr_ds.data.template import EncodedSample, SampleEncoder
from ilvr_ds.data.tokens import load_tokenizer
from ilvr_ds.demo.tiny import build_tiny_model
from ilvr_ds.generation.decoder import Decoder
from ilvr_ds.generation.loading import Reasoner
from ilvr_ds.model.layers.attention import use_varlen_attention
from ilvr_ds.model.layers.fused import use_fused_kernels
from ilvr_ds.model.student import detach_tower
from ilvr_ds.model.vision import VisionTower
from ilvr_ds.planning.geometry import KNOWN
from tests.bench.geometry import ROPE, TEXT, TINY

LATENT_SIZE = 8
TOWER = {"depth": 2, "hidden_size": 64, "num_heads": 2, "intermediate_size": 128, "fullatt_block_indexes": [1]}


def build(geometry: str, device: torch.device, dtype: torch.dtype, sizes: dict[str, int] | None = None) -> Reasoner:
    """A Reasoner with random weights, made on the device; tokenizer and image processor are those of a tiny model."""
    text = sizes or {**TEXT, "tiny": TINY}[geometry]
    vision = KNOWN[geometry].vision if geometry in KNOWN else None
    tower: dict[str, Any] = TOWER
    if vision is not None:
        tower = {"depth": vision.depth, "hidden_size": vision.hidden_size, "num_heads": vision.heads,
                 "intermediate_size": vision.intermediate_size, "fullatt_block_indexes": [7, 15, 23, 31]}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        build_tiny_model(Path(folder), texts=["How many remain?"] * 3)
        tokenizer, special = load_tokenizer(folder)
        images = ImageEncoder(folder, 2**26)
    ids = tokenizer.get_vocab()
    config = Qwen2_5_VLConfig(
        text_config={**text, "vocab_size": max(text["vocab_size"], 1024), "rope_parameters": dict(ROPE)},
        vision_config={**tower, "out_hidden_size": text["hidden_size"]},
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
    )  # fmt: skip
    torch.manual_seed(0)
    with device:
        model: Any = Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation="sdpa", dtype=dtype)
    model.eval().requires_grad_(False)
    tower_alone = detach_tower(model, lambda parameters: torch.no_grad())
    use_varlen_attention(tower_alone, device, dtype)
    use_fused_kernels(model.model.language_model, "auto", device, dtype)
    use_fused_kernels(tower_alone, "auto", device, dtype)
    reasoner = Reasoner(
        model=model,
        tower=VisionTower(tower_alone, images.mean, images.std).to(device),
        encoder=SampleEncoder(tokenizer, special, images, LATENT_SIZE, 2**20),
        latent_size=LATENT_SIZE,
        stop_ids=(special.im_end,),
        device=device,
    )
    return dataclasses.replace(reasoner, decoder=Decoder(reasoner))


def prompt_of(reasoner: Reasoner, side: int) -> EncodedSample:
    """A short question about a picture of so many pixels a side."""
    return reasoner.encoder.prompt(Sample("0", "How many remain?", (), (png(side),)))


def png(side: int) -> bytes:
    """A picture."""
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (200, 40, 90)).save(buffer, "PNG")
    return buffer.getvalue()


def longer(reasoner: Reasoner, prompt: EncodedSample, name: str, length: int) -> EncodedSample:
    """A prompt of so many tokens, or as many as it has already; the picture's patches are shared."""
    end = int(np.flatnonzero(prompt.input_ids == reasoner.special.vision_end)[0]) + 1
    filler = np.full(max(0, length - len(prompt.input_ids)), prompt.input_ids[end])
    ids = np.insert(prompt.input_ids, end, filler)
    positions = reasoner.encoder.positions(ids, list(prompt.grids))
    return dataclasses.replace(
        prompt, id=name, input_ids=ids, labels=np.full_like(ids, -100), position_ids=positions
    )  # fmt: skip
