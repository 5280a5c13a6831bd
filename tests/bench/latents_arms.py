"""The arms of tests/bench/latents.py: what the latents are taught."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

CHANGED = {"pool": "changed", "by": "change", "order": "place", "top_p": 1.0}


@dataclass(frozen=True)
class Arm:
    """What is taught."""

    form: str
    """Of the samples: latent, single, random, text, named, pads or look"""
    selection: dict[str, Any] = field(default_factory=dict)
    loss: dict[str, Any] = field(default_factory=dict)
    latents: int = 0
    """Of a segment; 0: as many as --latents says"""

    @property
    def has_latents(self) -> bool:
        """Whether its samples hold latent steps."""
        return self.form in ("latent", "single", "random")


LOOK = "look"
"""The arm before the arms: learning to see"""
ARMS = {
    LOOK: Arm("look"),
    "text": Arm("text"),
    "named": Arm("named"),
    "pads": Arm("pads"),
    "single": Arm("single", CHANGED),
    "random": Arm("random", {"pool": "region", "top_p": 1.0}),
    "published": Arm("latent", {"pool": "all", "temperature": 0.1}),
    "query": Arm("latent", {"pool": "changed", "by": "query", "top_p": 1.0}),
    "changed": Arm("latent", CHANGED),
    "others": Arm("latent", CHANGED, {"contrastive_negatives": "micro_batch", "contrastive_weight": 0.3}),
    "nearest": Arm("latent", CHANGED | {"compare": "nearest"}),
    "region": Arm("latent", {"pool": "region", "top_p": 1.0}, latents=1),
}
SECOND = ("detached", "through", "full")
MAIN = ["text", "pads", "random", "published+full", "changed+detached+full"]
OF_OPERATIONS = ("text", "published", "changed", "pads", "single", "query", "others", "nearest")
"""Arms for the four operations, which need no region from the data; the first three are its main ones."""
