from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tests.generation.conftest import golden, golden_model, reasoner

__all__ = ["golden", "golden_model", "model", "reasoner"]


@pytest.fixture(scope="session")
def model(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's random model with latent tokens; what it likes to say first opens a segment."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    from ilvr_ds.data.reader import ShardReader
    from ilvr_ds.data.shards import open_dataset
    from ilvr_ds.data.tokens import load_tokenizer
    from ilvr_ds.generation.generate import Generator
    from ilvr_ds.generation.loading import load_reasoner
    from ilvr_ds.generation.settings import GenerationSettings

    folder = tmp_path_factory.mktemp("model") / "model"
    shutil.copytree(demo_folder / "model", folder)
    tokenizer, special = load_tokenizer(str(demo_folder / "model"))
    tokenizer.save_pretrained(folder)
    stock = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder)
    stock.config.latent_size = 3
    stock.save_pretrained(folder)
    reasoner = load_reasoner(str(folder), torch.device("cpu"))
    sample = ShardReader(open_dataset(demo_folder / "held_out")).read(0)
    [answer] = Generator(reasoner, GenerationSettings(max_new_tokens=1))([reasoner.encoder.prompt(sample)]).answers
    weight = stock.lm_head.weight.data
    weight[special.latent_start] = 1.02 * weight[answer.tokens[0]]
    stock.save_pretrained(folder)
    return folder
