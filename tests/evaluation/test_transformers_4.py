"""Exports in a real transformers 4, in an environment of its own that borrows torch: the same tokens and logits as
ours."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ilvr_ds.data.sample import Sample
from ilvr_ds.demo.tiny import build_tiny_model
from ilvr_ds.generation.context import Context
from ilvr_ds.generation.loading import load_reasoner
from ilvr_ds.model.injection import write_images
from tests.data.packing import image_bytes
from tests.evaluation.environment import borrowing_environment, pip_install
from tests.evaluation.exporting import export_base, tied
from tests.ranks import ROOT

pytestmark = [pytest.mark.drill, pytest.mark.timeout(1500)]
QUESTION = "What is left of 12 circles?"
RELEASE = "transformers==4.57.*"


@pytest.fixture(scope="module")
def python_with_4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a fresh environment with transformers 4."""
    bin = borrowing_environment(tmp_path_factory.mktemp("transformers-4") / "venv")
    first = pip_install(bin, "--no-deps", RELEASE, env={**os.environ})
    if first.returncode:
        pytest.skip(f"PyPI cannot be reached: {first.stderr.strip().splitlines()[-1]}")
    rest = pip_install(bin, RELEASE, env={**os.environ})
    assert rest.returncode == 0, rest.stderr
    return bin / "python"


@torch.no_grad()
def ours(folder: Path, image: bytes) -> tuple[list[int], torch.Tensor]:
    """Tokens of the prompt, and the logits [T, V] that generation would have of it."""
    reasoner = load_reasoner(str(folder), torch.device("cpu"), "fp32")
    prompt = reasoner.encoder.prompt(Sample("s", QUESTION, (), (image,)))
    context = Context(reasoner, [prompt], 1)
    features = reasoner.tower(context.window.images[0])
    embeddings = write_images(context.embed(context.tokens.input_ids), context.tokens, features)
    positions = context.tokens.position_ids
    hidden = context.language_model(inputs_embeds=embeddings, position_ids=positions).last_hidden_state
    return prompt.input_ids.tolist(), reasoner.model.lm_head(hidden)[0]


def test_the_same_tokens_and_logits(
    python_with_4: Path, golden_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_tiny_model(tmp_path / "base", texts=[QUESTION] * 3)
    bases = {"tiny": tmp_path / "base", "tied": tied(tmp_path / "base", tmp_path / "tied-base"), "golden": golden_model}
    exports = [export_base(base, tmp_path / name / "model", monkeypatch) for name, base in bases.items()]
    image = image_bytes(5, size=(300, 200))
    (tmp_path / "image.png").write_bytes(image)
    script = ROOT / "tests/evaluation/with_transformers_4.py"
    command = [python_with_4, script, tmp_path / "image.png", QUESTION, *exports]
    subprocess.run([str(part) for part in command], check=True, cwd=tmp_path)
    for folder in exports:
        found = load_file(folder / "of-4.safetensors")
        (folder / "of-4.safetensors").unlink()
        ids, logits = ours(folder, image)
        assert found["input_ids"].tolist() == [ids]
        torch.testing.assert_close(found["logits"][0], logits, atol=1e-5, rtol=1e-5)
    heads = [any("lm_head" in name for name in load_file(next(f.glob("*.safetensors")))) for f in exports]
    assert heads == [True, False, True]
