"""A tiny Qwen3-VL from data to exported model: one rank and two under ZeRO-3, adapters, stored features, stage 2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from ilvr_ds.cli import main
from tests.conftest import RECIPE
from tests.ranks import run_ranks

pytestmark = [pytest.mark.drill, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen3") / "demo"
    draw = ["demo-data", "--output", str(folder), "--train", "16", "--held-out", "4", "--family", "qwen3_vl"]
    assert main(draw) == 0
    model = f"model.path={folder / 'model'}"
    pack = ["pack", "--input", str(folder / "task/train.jsonl"), "--output", str(folder / "train"), "--config", RECIPE]
    assert main([*pack, "--set", model]) == 0
    return folder


def train(demo: Path, folder: Path, world: int, *changes: str) -> Any:
    overrides = [
        f"run.output_dir={folder}", f"data.shards={demo / 'train'}", "data.eval_shards=null",
        f"model.path={demo / 'model'}", "train.max_steps=2", "train.micro_batch_size=4", "optim.warmup_steps=0",
        f"train.grad_accum_steps={2 // world}", "checkpoint.every_steps=0", "tracking.picture_samples=0",
        "optim.lr=1e-4", *changes,
    ]  # fmt: skip
    worker = "tests.distributed.workers_run:train_unrehearsed"
    return run_ranks(worker, world, folder / "ranks", timeout_s=500, recipe=RECIPE, overrides=overrides)[0]


STAGE_2 = ["train.stage=2", "train.latent_gradient=detached"]
FULL = ["train.stage=2", "train.latent_gradient=full", "loss.align_weight=0", "loss.contrastive_weight=0"]


@pytest.mark.parametrize("changes", [[], STAGE_2, FULL, ["model.lora_rank=4"]], ids=["1", "2", "2 full", "LoRA"])
def test_two_ranks_under_zero_3_take_the_steps_of_one(demo: Path, tmp_path: Path, changes: list[str]) -> None:
    one, two = (train(demo, tmp_path / str(world), world, *changes) for world in (1, 2))
    assert one["weights"].keys() == two["weights"].keys()
    for name, weight in one["weights"].items():
        # Adam divides by the gradient's size: where that is next to nothing, its rounding is a whole step
        assert (two["weights"][name] - weight).norm() < 1e-4 * weight.norm().clamp(min=1e-2), name


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
