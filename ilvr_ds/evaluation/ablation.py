"""Do the latents matter? The same evaluation with something else in their place, and what it changes.

Conditions: the model's own states (generated), zeros, gaussian noise of the same norm, the latents of another sample,
the pad token's embedding, and markers alone, so that latent_end follows latent_start at once. The audit has more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch

from ilvr_ds.generation.answers import Answer
from ilvr_ds.generation.latent_sources import Constant, LatentSource, Markers, Noise, OtherSample
from ilvr_ds.generation.loading import Reasoner

Condition = Literal["zeros", "noise", "other_sample", "pad_embedding", "markers"]
CONDITIONS: tuple[Condition, ...] = get_args(Condition)


def latent_source(condition: str, reasoner: Reasoner, generated: Sequence[Answer], seed: int) -> LatentSource:
    """What stands in for the latents of a batch whose answers with its own latents (kept) are `generated`."""
    if condition == "markers":
        return Markers()
    if condition == "noise":
        return Noise([answer.id for answer in generated], seed, reasoner.device)
    if condition == "other_sample":
        return OtherSample(generated, reasoner.latent_size, reasoner.device)
    pad = reasoner.pad_embedding
    return Constant(pad if condition == "pad_embedding" else torch.zeros_like(pad))
