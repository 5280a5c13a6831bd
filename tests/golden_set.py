"""A golden data set: the folder named by ILVR_GOLDEN, its samples, its model and the numbers to match."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from ilvr_ds.config import LossConfig, ModelConfig, Pool, SelectionConfig
from ilvr_ds.data.collate import Collator
from ilvr_ds.data.images import ImageEncoder
from ilvr_ds.data.sample import Sample
from ilvr_ds.data.template import EncodedSample, SampleEncoder
from ilvr_ds.data.tokens import load_tokenizer
from ilvr_ds.data.window import Window
from ilvr_ds.ingest.importers import Rejected
from ilvr_ds.model.student import load_config, vision_layout
from tests.ingest.records import read_records

DEFAULT = Path(__file__).parent / "golden" / "upstream-ilvr"


@dataclass(frozen=True)
class GoldenSet:
    """Everything about the set is read from its folder."""

    folder: Path

    @property
    def weights(self) -> Path:
        """The folder of configuration and weights."""
        return self.folder

    @property
    def processor(self) -> Path:
        """The folder of tokenizer and image processor."""
        return self.folder / "processor"

    @cached_property
    def settings(self) -> dict[str, Any]:
        return json.loads((self.folder / "expected.json").read_text())

    @cached_property
    def expected(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "expected.safetensors")

    @cached_property
    def samples(self) -> list[Sample]:
        records = list(read_records(self.folder / "TRAIN.jsonl", self.folder, "ilvr"))
        assert not [r for r in records if isinstance(r, Rejected)], records
        return records

    @cached_property
    def encoder(self) -> SampleEncoder:
        tokenizer, special = load_tokenizer(str(self.processor))
        images = ImageEncoder(str(self.processor), max_pixels=2**26)
        return SampleEncoder(tokenizer, special, images, self.settings["latent_size"], max_tokens=2**20)

    @cached_property
    def encoded(self) -> list[EncodedSample]:
        return [self.encoder(sample) for sample in self.samples]

    @property
    def padding_side(self) -> str:
        return self.encoder.tokenizer.padding_side

    @property
    def model(self) -> ModelConfig:
        return ModelConfig(path=str(self.weights), latent_size=self.settings["latent_size"], attention="sdpa")

    @property
    def selection(self) -> SelectionConfig:
        return SelectionConfig(group_size=self.settings["helper_group_L"], top_p=self.settings["coverage_p"])

    @property
    def loss(self) -> LossConfig:
        s = self.settings
        return LossConfig(
            ce_weight=s["ce_weight"], align_weight=s["sim_weight"], contrastive_weight=0.0, target_noise_std=s["noise"]
        )

    def collator(self, rows: str | None = None, free_latents: bool = False, pool: Pool = "all") -> Collator:
        layout = vision_layout(load_config(str(self.weights)))
        group = self.selection.group_size
        size = self.settings["latent_size"]
        return Collator(self.encoder.special, layout, size, group, rows or self.padding_side, free_latents, pool=pool)

    def window(self, indices: list[int], micro_batch_size: int, rows: str | None = None) -> Window:
        """Padded as the folder says where `rows` does not say otherwise."""
        samples = [self.encoded[i] for i in indices]
        return self.collator(rows)(samples, np.array(indices), equal_sizes(len(samples), micro_batch_size))

    def free_window(self, indices: list[int], micro_batch_size: int, rows: str | None = None) -> Window:
        """The same for stage 2: without helper images, with the rollout's layout."""
        samples = [without_helpers(self.encoded[i]) for i in indices]
        sizes = equal_sizes(len(samples), micro_batch_size)
        return self.collator(rows, free_latents=True)(samples, np.array(indices), sizes)


def equal_sizes(samples: int, micro_batch_size: int) -> list[int]:
    """Micro-batches of one size."""
    assert samples % micro_batch_size == 0
    return [micro_batch_size] * (samples // micro_batch_size)


def without_helpers(sample: EncodedSample) -> EncodedSample:
    """A sample as stage 2 encodes it."""
    count = sample.num_input_images
    return replace(sample, patches=sample.patches[:count], grids=sample.grids[:count])


def golden_set() -> GoldenSet:
    return GoldenSet(Path(os.environ.get("ILVR_GOLDEN", DEFAULT)))


__all__ = ["GoldenSet", "golden_set", "replace"]
