"""Synchronisations with the host, found by torch's debug mode, by the code that asked for them."""

from __future__ import annotations

import re
import traceback
import warnings
from collections import Counter

import torch

KNOWN = re.compile(r"/deepspeed/|/ilvr_ds/distill/ema\.py:\d+ wait$")
"""DeepSpeed's own, and the teacher's wait for its update, once a step."""


def unknown(places: dict[str, int]) -> dict[str, int]:
    """Those that should not be."""
    return {place: count for place, count in places.items() if not KNOWN.search(place)}


class Syncs:
    """Counts those inside its blocks."""

    def __init__(self) -> None:
        self.places: Counter[str] = Counter()

    def __enter__(self) -> None:
        self._catcher = warnings.catch_warnings()
        self._catcher.__enter__()
        warnings.simplefilter("always")
        warnings.showwarning = self._note  # type: ignore[assignment]
        torch.cuda.set_sync_debug_mode("warn")

    def __exit__(self, *error: object) -> None:
        torch.cuda.set_sync_debug_mode("default")
        self._catcher.__exit__(*error)

    def _note(self, message: Warning, *_: object) -> None:
        if "synchronizing CUDA operation" not in str(message):
            return
        frames = [f for f in traceback.extract_stack() if re.search("/(ilvr_ds|deepspeed|transformers)/", f.filename)]
        last = frames[-1] if frames else None
        self.places[f"{last.filename}:{last.lineno} {last.name}" if last else "an unknown place"] += 1
