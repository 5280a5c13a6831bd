"""Exports in a real vLLM: prompts, log-probabilities and greedy tokens are those of `Generator` without latents.

ILVR_DS_VLLM names a Python that has vLLM; docs/evaluation.md says how to make one.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from ilvr_ds.data.sample import Sample
from ilvr_ds.data.template import EncodedSample
from ilvr_ds.data.turns import prompt_turns
from ilvr_ds.demo.material import TRAINED, TRAINED_ON
from ilvr_ds.demo.task.generate import draw_samples
from ilvr_ds.demo.tiny import TinySize, build_tiny_model
from ilvr_ds.generation.context import Context
from ilvr_ds.generation.generate import Generator
from ilvr_ds.generation.loading import Reasoner, load_reasoner
from ilvr_ds.generation.settings import GenerationSettings
from tests.evaluation.exporting import export_base, tied
from tests.evaluation.questions import LIMIT, questions
from tests.ranks import ROOT

PYTHON = os.environ.get("ILVR_DS_VLLM")
pytestmark = [
    pytest.mark.drill,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(not PYTHON, reason="ILVR_DS_VLLM names no Python that has vLLM"),
]
MAX_TOKENS = 24
ATOL = 1e-4
SCALED_ATOL = 5e-3
"""With an image that is scaled: torchvision, which vLLM uses, and Pillow differ by up to two of 255 levels then."""
SIZE = TinySize(128, 256, 2, 2, 1, vision_hidden_size=64, vision_heads=2, vocab_size=512)
"""Heads of 64: vLLM's attention on a CPU refuses those of 16 that the smallest model has."""


def base(name: str, folder: Path) -> Path:
    """A random model."""
    build_tiny_model(
        folder, texts=["How many remain?"] * 3, size=SIZE, family="qwen3_vl" if name == "qwen3_vl" else "qwen2_5_vl"
    )
    return tied(folder, folder.parent / "tied-base") if name == "tied" else folder


def engine_says(model: Path, samples: list[Sample], forbidden: list[int], folder: Path, **more: str) -> dict[str, Any]:
    """What `with_vllm.py` found."""
    turns = [_with_files(sample, folder) for sample in samples]
    job = folder / "job.json"
    asked = {"model": str(model), "turns": turns, "max_tokens": MAX_TOKENS, "forbidden": forbidden}
    job.write_text(json.dumps({**asked, **more}))
    subprocess.run([str(PYTHON), str(ROOT / "tests/evaluation/with_vllm.py"), str(job)], check=True, cwd=folder)
    found: dict[str, Any] = json.loads(job.with_suffix(".found.json").read_text())
    return found


def _with_files(sample: Sample, folder: Path) -> list[dict[str, Any]]:
    """The sample's turns; the part of an image names its file."""
    files = []
    for number, data in enumerate(sample.input_images):
        files.append(folder / f"{sample.id}-{number}.png")
        files[-1].write_bytes(data)
    following = iter(files)
    return [
        {
            **turn,
            "content": [
                {**part, "image": str(next(following))} if part["type"] == "image" else part for part in turn["content"]
            ],
        }
        for turn in prompt_turns(sample)
    ]


def check(found: dict[str, Any], reasoner: Reasoner, prompts: list[EncodedSample]) -> list[list[int]]:
    """Prompts, first log-probabilities and tokens are ours, which are returned."""
    assert found["prompts"] == [prompt.input_ids.tolist() for prompt in prompts]
    for prompt, first in zip(prompts, found["first"], strict=True):
        with torch.no_grad():
            ours = reasoner.model.lm_head(Context(reasoner, [prompt], 1).prefill())[0].log_softmax(-1)
        tokens = [int(token) for token in first]
        atol = SCALED_ATOL if prompt.id == "two" else ATOL
        torch.testing.assert_close(torch.tensor([*first.values()]), ours[tokens], atol=atol, rtol=0)
    settings = GenerationSettings(max_new_tokens=MAX_TOKENS, forbidden=(reasoner.special.latent_start,))
    said = [list(answer.tokens) for answer in Generator(reasoner, settings)(prompts).answers]
    assert found["text"] == said
    return said


def opened(model: Path, samples: list[Sample]) -> tuple[Reasoner, list[EncodedSample], list[int]]:
    """The model, its prompts, and its latent tokens."""
    reasoner = load_reasoner(str(model), torch.device("cpu"), "fp32")
    special = reasoner.special
    latent = [special.latent_pad, special.latent_start, special.latent_end]
    return reasoner, [reasoner.encoder.prompt(sample) for sample in samples], latent


@pytest.mark.parametrize("name", ["plain", "tied", "qwen3_vl"])
def test_a_random_model(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = export_base(base(name, tmp_path / "base"), tmp_path / "model", monkeypatch, LIMIT)
    samples = questions(32 if name == "qwen3_vl" else 28)
    reasoner, prompts, latent = opened(model, samples)
    found = engine_says(model, samples, latent, tmp_path)
    check(found, reasoner, prompts)
    one, another = found["first"][1:3]
    assert max(abs(one[token] - another[token]) for token in one.keys() & another.keys()) > 1e-3  # images are seen


def test_adapters_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = base("plain", tmp_path / "base")
    (tmp_path / "merged").mkdir()
    merged = export_base(start, tmp_path / "merged/model", monkeypatch, LIMIT, "model.lora_rank=8", random=True)
    apart = export_base(
        start, tmp_path / "model", monkeypatch, LIMIT, "model.lora_rank=8", adapters="apart", random=True
    )  # fmt: skip
    reasoner, prompts, latent = opened(merged, questions())
    found = engine_says(apart, questions(), latent, tmp_path, adapter=str(apart / "adapter"))
    said = check(found, reasoner, prompts)
    shutil.rmtree(apart / "adapter")
    reasoner, prompts, _ = opened(apart, questions())
    settings = GenerationSettings(max_new_tokens=MAX_TOKENS, forbidden=(latent[1],))
    assert [list(answer.tokens) for answer in Generator(reasoner, settings)(prompts).answers] != said


def test_a_trained_model_opens_segments_unless_it_is_forbidden(tmp_path: Path) -> None:
    samples = list(islice(draw_samples(TRAINED_ON, 0, "held_out", 4), 4))
    reasoner, prompts, latent = opened(TRAINED, samples)
    found = engine_says(TRAINED, samples, latent, tmp_path)
    check(found, reasoner, prompts)
    assert all(reasoner.special.latent_start in tokens for tokens in found["free"])
