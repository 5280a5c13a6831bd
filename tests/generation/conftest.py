from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from ilvr_ds.generation.loading import Reasoner
    from tests.golden_set import GoldenSet


@pytest.fixture(scope="session")
def golden() -> GoldenSet:
    from tests.golden_set import golden_set

    return golden_set()


@pytest.fixture(scope="session")
def golden_model(golden: GoldenSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden model with its tokenizer in one folder, as a released checkpoint has them."""
    folder = tmp_path_factory.mktemp("golden") / "model"
    # without version 4's lists of added tokens, which transformers 5.17 cannot read beside a tokenizer of its own
    shutil.copytree(golden.folder / "processor", folder, ignore=shutil.ignore_patterns("added_tokens*", "special_tok*"))
    golden.encoder.tokenizer.save_pretrained(folder)  # the stored one lacks the latent tokens
    for name in ("config.json", "model.safetensors"):
        shutil.copy(golden.folder / name, folder)
    return folder


@pytest.fixture(scope="session")
def reasoner(golden_model: Path) -> Reasoner:
    from ilvr_ds.generation.loading import load_reasoner

    return load_reasoner(str(golden_model), torch.device("cpu"), precision="fp32")
