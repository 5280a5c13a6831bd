"""Whether all ranks are about to train the same: a host may have a copy of its own of the data, or of the recipe."""

from __future__ import annotations

import socket
from typing import Any

from ilvr_ds import dist
from ilvr_ds.config import Recipe
from ilvr_ds.errors import UserError
from ilvr_ds.training.assembly.inputs import Inputs

_OWN = (
    "data.shards", "data.eval_shards", "data.features", "data.eval_features", "data.num_workers", "model.path",
    "model.init_from", "run.output_dir", "deepspeed.config", "tracking.",
)  # fmt: skip
"""Settings that may be a host's own, most of them paths: what lies there is compared where it matters."""


def check_alike(recipe: Recipe, inputs: Inputs) -> None:
    """Raise UserError on all ranks where their data or settings differ, with the first that does (collective).

    Else hosts would train on different samples in silence, or with other numbers of steps wait for each other.
    """
    mine: dict[str, Any] = {"data.shards": inputs.training.fingerprint}
    if inputs.held_out is not None:
        mine["data.eval_shards"] = inputs.held_out.fingerprint
    mine |= {key: value for key, value in recipe.flat().items() if not key.startswith(_OWN)}
    mine["deepspeed.config"] = inputs.file_settings
    everyone = dist.gather_on_host((socket.gethostname(), mine))
    host, first = everyone[0]
    for rank, (other, theirs) in enumerate(everyone):
        for key in dict.fromkeys([*first, *theirs]):
            if first.get(key) == theirs.get(key):
                continue
            where = f"rank 0 on {host} and rank {rank} on {other}"
            if key in ("data.shards", "data.eval_shards"):
                raise UserError(f"{key}: {where} have different data sets there; give every host the same copy")
            what = "" if key == "deepspeed.config" else f" ({first.get(key)} and {theirs.get(key)})"
            raise UserError(f"{key}: {where} have different settings{what}; give all ranks the same recipe and options")
