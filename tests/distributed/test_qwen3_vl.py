"""A tiny Qwen3-VL from data to exported model: one rank and two under ZeRO-3, adapters, stored features, stage 2."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from ilvr_ds.cli import main
from ilvr_ds.data.sample import Sample
from ilvr_ds.data.tokens import load_tokenizer
from ilvr_ds.generation.generate import Generator
from ilvr_ds.generation.loading import load_reasoner
from ilvr_ds.generation.settings import GenerationSettings
from ilvr_ds.serving.limits import Limits
from ilvr_ds.serving.server import own_names
from tests.conftest import make_demo
from tests.data.packing import image_bytes
from tests.ranks import run_ranks
from tests.recipes import RECIPE
from tests.stores import with_tables

pytestmark = [pytest.mark.drill, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    drawn = ["--train", "16", "--held-out", "4", "--family", "qwen3_vl"]
    return make_demo(tmp_path_factory.mktemp("qwen3") / "demo", *drawn)


def train(demo: Path, folder: Path, world: int, *changes: str, stop_after: int = 0) -> Any:
    worker = "tests.distributed.workers_run:train" + ("" if stop_after else "_unrehearsed")
    stopping = {"stop_after": stop_after} if stop_after else {}
    overrides = [
        f"run.output_dir={with_tables(folder)}", f"data.shards={demo / 'train'}", "data.eval_shards=null",
        f"model.path={demo / 'model'}", "train.max_steps=2", "train.micro_batch_size=4", "optim.warmup_steps=0",
        f"train.grad_accum_steps={2 // world}", "checkpoint.every_steps=0", "tracking.picture_samples=0",
        "optim.lr=1e-4", *changes,
    ]  # fmt: skip
    ranks = folder / f"ranks-{len(list(folder.glob('ranks-*')))}"
    return run_ranks(worker, world, ranks, timeout_s=500, recipe=RECIPE, overrides=overrides, **stopping)[0]


STAGE_2 = ["train.stage=2", "train.latent_gradient=detached"]
FULL = ["train.stage=2", "train.latent_gradient=full", "loss.align_weight=0", "loss.contrastive_weight=0"]


@pytest.mark.parametrize("changes", [[], STAGE_2, FULL, ["model.lora_rank=4"]], ids=["1", "2", "2 full", "LoRA"])
def test_two_ranks_under_zero_3_take_the_steps_of_one(demo: Path, tmp_path: Path, changes: list[str]) -> None:
    one, two = (train(demo, tmp_path / str(world), world, *changes) for world in (1, 2))
    assert one["weights"].keys() == two["weights"].keys()
    for name, weight in one["weights"].items():
        # Adam divides by the gradient's size: where that is next to nothing, its rounding is a whole step
        assert (two["weights"][name] - weight).norm() < 1e-4 * weight.norm().clamp(min=1e-2), name


def test_a_tied_head_is_trained_on_two_ranks(demo: Path, tmp_path: Path) -> None:
    """As the 2B and the 4B have it: one weight, two gradients, sharded."""
    tied = tmp_path / "tied"
    shutil.copytree(demo / "model", tied)
    config, weights = json.loads((tied / "config.json").read_text()), load_file(tied / "model.safetensors")
    (tied / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    save_file({n: w for n, w in weights.items() if n != "lm_head.weight"}, tied / "model.safetensors", {"format": "pt"})
    one, two = (train(demo, tmp_path / str(world), world, f"model.path={tied}") for world in (1, 2))
    assert one["weights"].keys() == two["weights"].keys() and not any("lm_head" in name for name in one["weights"])
    for name, weight in one["weights"].items():
        assert (two["weights"][name] - weight).norm() < 1e-4 * weight.norm().clamp(min=1e-2), name


def test_a_run_goes_on_on_another_number_of_ranks(demo: Path, tmp_path: Path) -> None:
    whole = train(demo, tmp_path / "whole", 2)
    train(demo, tmp_path / "part", 2, stop_after=1)
    again = train(demo, tmp_path / "part", 1, "checkpoint.resume=must")
    for name, weight in whole["weights"].items():
        assert (again["weights"][name] - weight).norm() < 1e-4 * weight.norm().clamp(min=1e-2), name
    assert len(again["teacher"]) == len(whole["teacher"]) > 0


def test_stored_features_train_as_the_tower_does(demo: Path, tmp_path: Path) -> None:
    """Deepstack's rows too; stored in bf16, which rounds to 2^-9."""
    model, shards, rows = (str(path) for path in (demo / "model", demo / "train", tmp_path / "features"))
    assert main(["encode", "--shards", shards, "--config", RECIPE, "--model", model, "--output", rows]) == 0
    seen, stored = (
        train(demo, tmp_path / name, 1, *changes)
        for name, changes in (("seen", []), ("stored", [f"data.features={rows}"]))
    )
    for name, weight in seen["weights"].items():
        assert (stored["weights"][name] - weight).norm() < 0.01 * weight.norm().clamp(min=1e-2), name


def test_what_is_exported_loads_in_stock_transformers(demo: Path, tmp_path: Path) -> None:
    result = train(demo, tmp_path, 1)
    assert main(["export", f"{tmp_path / 'demo'}", "--to", f"{tmp_path / 'model'}"]) == 0
    model, info = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "model", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    base = AutoModelForImageTextToText.from_pretrained(demo / "model", dtype=torch.float32).state_dict()
    for name, value in model.state_dict().items():
        wanted = base[name] if "visual" in name else result["weights"][f"model.{name}"]
        assert torch.equal(value, wanted), name
    assert main(["generate", "--model", f"{tmp_path / 'model'}", "--question", "Hi", "--max-new-tokens", "4"]) == 0
    asked = ["--model", f"{tmp_path / 'model'}", "--shards", f"{demo / 'train'}", "--benchmark", "option-letter"]
    asked += ["--max-new-tokens", "40", "--batch-size", "8"]
    assert main(["evaluate", *asked, "--output", f"{tmp_path / 'scores'}", "--ablate-latents"]) == 0
    scores = json.loads((tmp_path / "scores/scores.json").read_text())
    for rule in scores["rules"].values():
        assert sum(kind["samples"] for kind in rule["types"].values()) == 16
    assert main(["audit", *asked, "--output", f"{tmp_path / 'audit'}"]) == 0
    audit = json.loads((tmp_path / "audit/audit.json").read_text())
    assert {"replacement", "donor"} <= audit.keys() and audit["inside"], audit.keys()


def test_the_endpoint_sees_pictures(demo: Path, tmp_path: Path) -> None:
    """A served model's answer is the one that it gives to the same question in a batch of its own."""
    pytest.importorskip("fastapi")
    from fastapi.testclient import TestClient

    from ilvr_ds.serving.endpoint import Access, Endpoint

    tokenizer, _ = load_tokenizer(str(demo / "model"))
    shutil.copytree(demo / "model", tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    reasoner = load_reasoner(str(tmp_path / "model"), torch.device("cpu"), "fp32", latent_size=4)
    settings = GenerationSettings(max_new_tokens=12)
    picture = image_bytes(size=(128, 96))
    prompt = reasoner.encoder.prompt(Sample("asked", "What is it?", (), (picture,)))
    [alone] = Generator(reasoner, settings)([prompt]).answers
    served = Endpoint(reasoner, "tiny", Limits(images=1, generation=settings), Access(None, own_names("127.0.0.1"), ()))
    url = "data:image/png;base64," + base64.b64encode(picture).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is it?"}]
    body = {"model": "tiny", "messages": [{"role": "user", "content": content}], "temperature": 0}
    with TestClient(served.app(), base_url="http://127.0.0.1") as client:
        reply = client.post("/v1/chat/completions", json=body).json()
    assert reply["choices"][0]["message"]["content"] == alone.text
