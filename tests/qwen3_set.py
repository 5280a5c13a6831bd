"""The golden set's samples, and two without images, on a tiny random Qwen3-VL."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ilvr_ds.data.sample import IMAGE_MARKER, Sample, TextStep
from ilvr_ds.demo.tiny import build_tiny_model
from tests.golden_set import DEFAULT, GoldenSet


@dataclass(frozen=True)
class Qwen3Set(GoldenSet):
    """`folder`: the golden set's."""

    model_folder: Path

    @property
    def weights(self) -> Path:
        return self.model_folder

    @property
    def processor(self) -> Path:
        return self.model_folder

    @cached_property
    def samples(self) -> list[Sample]:
        """Six with images; then one with a segment and one without, both without images."""
        pictured = GoldenSet(self.folder).samples
        return [*pictured, *(blind(pictured[i], name) for i, name in ((2, "blind 2"), (5, "blind 5")))]


def blind(sample: Sample, name: str) -> Sample:
    """The sample without its input images."""
    return replace(sample, id=name, question=sample.question.replace(IMAGE_MARKER, ""), input_images=())


def qwen3_set(folder: Path, is_tied: bool = False) -> Qwen3Set:
    """With a model built in `folder`; norms and biases are random, and deepstack says much."""
    samples = GoldenSet(DEFAULT).samples
    texts = [" ".join([s.question, *(step.content for step in s.steps if isinstance(step, TextStep))]) for s in samples]
    build_tiny_model(folder, texts=texts, family="qwen3_vl")
    weights = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for tensor in weights.values():
        if tensor.dim() == 1:  # norms are 1 and biases 0 in a fresh model: mistakes would not show
            tensor += 0.2 * torch.randn(tensor.shape, generator=generator)
    if is_tied:
        del weights["lm_head.weight"]
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return Qwen3Set(DEFAULT, folder)


def with_latent_tokens(found: Qwen3Set, folder: Path) -> Path:
    """A copy of the model whose tokenizer has the latent tokens, as an exported one."""
    shutil.copytree(found.model_folder, folder)
    found.encoder.tokenizer.save_pretrained(folder)
    return folder
