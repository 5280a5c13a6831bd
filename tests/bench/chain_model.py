"""Random weights that answer in a known form: a model folder of any geometry whose answers have segments.

Random weights never write latent_start. So the head is planted: it knows, for a chain of tokens, which comes next, and
after the last one it opens a segment; after latent_end the chain begins anew. Embeddings are so large that the last
hidden state is nearly that of the token alone, whatever the layers, random as they are, add to it. An answer thus is a
chain, a segment, a chain, a segment, and so on up to --max-new-tokens; it never ends by itself, and all samples'
answers are equally long. What a step costs does not depend on what the weights are.
"""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ilvr_ds.data.tokens import SpecialTokens, load_tokenizer
from ilvr_ds.model.families import family_of
from ilvr_ds.model.student import load_config
from tests.bench.noise import write_geometry

SCALE = 100.0
"""Of embeddings, beside about 10 that 28 random layers add"""
FIRST = 256
"""Id of the chain's first token: behind the bytes, a word or a piece of one"""


def write_chain_model(folder: Path, geometry: str, chain: int, latent_size: int, device: torch.device) -> None:
    """Write the folder, weights in bf16 on a GPU and in fp32 elsewhere. chain: tokens between two segments."""
    write_geometry(folder, geometry)
    tokenizer, special = load_tokenizer(str(folder))
    tokenizer.save_pretrained(folder)
    config = load_config(str(folder))
    is_gpu = device.type == "cuda"
    with device:
        torch.manual_seed(0)
        model: Any = family_of(config).model._from_config(config, dtype=torch.bfloat16 if is_gpu else torch.float32)
    start = tokenizer("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"][-1]
    head = torch.empty_like(model.get_input_embeddings().weight)
    _plant(model.get_input_embeddings().weight.data, head, special, int(start), chain)
    model.lm_head.weight = torch.nn.Parameter(head)  # no longer tied
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
    model.config.latent_size = latent_size
    model.save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    assert written["latent_size"] == latent_size
    del model, head
    gc.collect()
    if is_gpu:
        torch.cuda.empty_cache()


@torch.no_grad()
def _plant(embeddings: Tensor, head: Tensor, special: SpecialTokens, start: int, chain: int) -> None:
    """Fill embeddings and head, both [V, D]; start: the last token of every prompt."""
    embeddings.normal_()
    head.normal_(std=0.02 / embeddings.shape[1] ** 0.5)
    head[[special.im_end, special.pad]] = 0  # never the likeliest of so many
    words = list(range(FIRST, FIRST + chain))
    for before, after in zip(words, [*words[1:], special.latent_start], strict=True):
        head[after] = embeddings[before]
    head[FIRST] = embeddings[special.latent_end] + embeddings[start]
    embeddings *= SCALE
