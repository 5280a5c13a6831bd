from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from ilvr_ds.evaluation.generate import GenerationSettings

if TYPE_CHECKING:
    from ilvr_ds.evaluation.loading import Reasoner


@pytest.fixture(scope="session")
def latent_reasoner(latent_model: Path) -> Reasoner:
    from ilvr_ds.evaluation.loading import load_reasoner

    return load_reasoner(str(latent_model), torch.device("cpu"), "fp32")


def that_speak(reasoner: Reasoner, settings: GenerationSettings) -> GenerationSettings:
    """The same, but that an answer begins with a letter: a random model may say nothing that can be shown."""
    [letter] = reasoner.encoder.tokenizer("a", add_special_tokens=False)["input_ids"]
    return replace(settings, forced={0: letter})


def until(is_so: Callable[[], bool]) -> None:
    """Wait for it."""
    end = time.monotonic() + 200
    while not is_so():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)
