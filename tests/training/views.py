"""Views of the demo's samples, for test_pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ilvr_ds import dist
from ilvr_ds.config import load_recipe
from ilvr_ds.data.sample import Sample
from ilvr_ds.engine.networks import init_process_group
from ilvr_ds.errors import UserError
from ilvr_ds.pictures.views import SampleView
from ilvr_ds.training.assembly import assemble
from ilvr_ds.training.components import Components


def views(demo: str, recipe: str, changes: list[str]) -> list[SampleView]:
    """Views of a run with a teacher."""
    parts = _assemble(recipe, demo, changes)
    assert parts.pictures.latent_views is not None
    found = parts.pictures.latent_views()
    parts.tracker.close("KILLED", timeout_s=0)
    return found


def views_of_what_went_away(demo: str) -> list[SampleView]:
    """The same where a sample can no longer be read when its view is made."""
    parts = _assemble("launch/recipes/demo.yaml", demo, [])
    latent_views = parts.pictures.latent_views
    assert latent_views is not None
    latent_views()
    read, first = latent_views.dataset.reader.read, int(latent_views.numbers[0])

    def lost(number: int) -> Sample:
        if number == first:
            raise UserError("the server is away")
        return read(number)

    latent_views.dataset.reader.read = lost  # type: ignore[method-assign]
    found = latent_views()
    parts.tracker.close("KILLED", timeout_s=0)
    return found


def free_views(demo: str, deepspeed: str) -> dict[str, Any]:
    """Views of a stage 2 without a teacher, and the same maps from a step that reads no helper image."""
    more = ["model.init_from=null", f"deepspeed.config={deepspeed}", "tracking.picture_samples=2"]
    more += ["loss.align_weight=0", "loss.contrastive_weight=0"]
    more.append("train.micro_batch_size=4")
    parts = _assemble("launch/recipes/demo-stage2.yaml", demo, more)
    latent_views = parts.pictures.latent_views
    assert latent_views is not None
    found = latent_views()
    maps = [_maps(parts, int(number)) for number in latent_views.numbers]
    parts.tracker.close("KILLED", timeout_s=0)
    return {"views": found, "maps": maps, "is_training": parts.step.student.training}


@torch.no_grad()
def _maps(parts: Components, number: int) -> list[NDArray[np.float32]]:
    """Of each segment of a held-out sample: cosines [K, patches] of the last hidden state before each slot."""
    assert parts.held_out is not None
    dataset, student = parts.held_out.dataset, parts.step.student
    window = dataset.window([np.array([number])])
    prepared = parts.step.prepare(window.to(dist.device()))
    [micro] = prepared.window.micro_batches
    assert len(micro.segments) == 0, "training reads no helper image"
    seen: list[torch.Tensor] = []
    hidden = student.module.hidden
    student.module.hidden = lambda *arguments: seen.append(hidden(*arguments)) or seen[-1]
    student(micro, prepared.features)
    del student.module.hidden
    sample = dataset.reader.read(number)
    first = dataset.encoder(sample).segments
    return [
        _cosine(seen[0][0, first[m] - 1 : first[m] + 3], _features(parts, helper))
        for m, helper in enumerate(sample.helper_images)
    ]


def _features(parts: Components, image: bytes) -> torch.Tensor:
    """[patches, D] of an image as the only input of a sample."""
    assert parts.held_out is not None
    dataset = parts.held_out.dataset
    alone = dataset.encoder.prompt(Sample("alone", "?", steps=(), input_images=(image,)))
    return parts.step.vision.features(dataset.collator([alone], np.arange(1), [1]))


def _cosine(latents: torch.Tensor, patches: torch.Tensor) -> NDArray[np.float32]:
    return torch.nn.functional.cosine_similarity(latents[:, None].double(), patches[None].double(), dim=-1).numpy()


def _assemble(recipe: str, demo: str, more: list[str]) -> Components:
    init_process_group()
    root = Path(demo)
    overrides = [
        f"run.output_dir={root / 'views'}", f"data.shards={root / 'train'}", f"data.eval_shards={root / 'held_out'}",
        f"model.path={root / 'model'}", "evaluation.max_samples=8", "tracking.uri=http://127.0.0.1:9",
        *more,
    ]  # fmt: skip
    return assemble(load_recipe(recipe, overrides), Path(recipe))
