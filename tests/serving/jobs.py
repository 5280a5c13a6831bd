"""Jobs that surely speak, and waiting for what other threads do."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from ilvr_ds.generation.settings import GenerationSettings

if TYPE_CHECKING:
    from ilvr_ds.generation.loading import Reasoner


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
