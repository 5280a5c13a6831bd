"""Training on stored features: the same losses without a tower, on one rank and on two, in both stages."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ilvr_ds.cli import main
from ilvr_ds.data.features import open_features
from ilvr_ds.data.plan import SamplePlan
from ilvr_ds.data.shards import open_dataset
from tests import forks
from tests.distributed.test_bad_data import lines
from tests.distributed.test_runs import losses, overrides
from tests.ranks import ROOT, run_ranks
from tests.recipes import RECIPE

WORKERS = "tests.distributed.workers_features:"


@pytest.fixture(scope="module")
def features(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The features of the demo's two data sets, from a tower in fp32."""
    folder = tmp_path_factory.mktemp("stored")
    for split in ("train", "held_out"):
        arguments = ["--shards", str(demo_folder / split), "--model", str(demo_folder / "model")]
        arguments += ["--precision", "fp32", "--workers", "0", "--output", str(folder / split)]
        assert main(["encode", *arguments]) == 0
    return folder


def keys(features: Path) -> list[str]:
    return [f"data.features={features / 'train'}", f"data.eval_features={features / 'held_out'}"]


@pytest.mark.parametrize(
    ("stage", "weights"), [(1, []), (2, []), (2, ["loss.align_weight=0", "loss.contrastive_weight=0"])]
)
@pytest.mark.parametrize("world", [1, 2])
def test_losses_and_gradients_equal_those_with_the_tower(
    world: int, stage: int, weights: list[str], tmp_path: Path, demo_folder: Path, features: Path
) -> None:
    """Bit by bit where the tower's output is rounded to bf16 too, to bf16 tolerance where it is not. Catches rows of
    another image, sample or patch, in training and in evaluation; and a tower that is built all the same."""
    settings = overrides(tmp_path, demo_folder, train__stage=stage, optim__max_grad_norm=0) + weights
    if stage == 2:
        settings.append(f"deepspeed.config={ROOT}/ds_configs/zero2.json")
    for result in run_ranks(
        WORKERS + "with_and_without_tower", world, tmp_path, recipe=RECIPE, overrides=settings, features=keys(features)
    ):
        stored, tower, rows = result["stored"], result["tower"], result["rows"]
        assert stored["built"] == 0 < tower["built"]
        assert (stored["loss"], stored["sums"], stored["eval"]) == (rows["loss"], rows["sums"], rows["eval"])
        assert stored["grads"].keys() == tower["grads"].keys()
        for name, gradient in stored["grads"].items():
            assert torch.equal(gradient, rows["grads"][name]), name
            error = (gradient - tower["grads"][name]).norm() / tower["grads"][name].norm().clamp(min=1e-12)
            assert float(error) < 2e-2, name
        assert stored["loss"] == pytest.approx(tower["loss"], rel=1e-3)
        moved = [name for name, value in tower["grads"].items() if not torch.equal(stored["grads"][name], value)]
        assert moved, "the tower's own output is not rounded: these are two different runs"
        assert stored["eval"] == pytest.approx(tower["eval"], rel=2e-3)


@pytest.mark.drill
def test_resume_is_bitwise_equal_and_no_tower_is_built(tmp_path: Path, demo_folder: Path, features: Path) -> None:
    """Stopped after 3 of 6 steps on 2 ranks and gone on, with loader workers."""
    worker = "tests.distributed.workers_run:train"
    whole, parts = (
        [*overrides(tmp_path / name, demo_folder, data__num_workers=1), *keys(features)] for name in ("whole", "parts")
    )
    one = run_ranks(worker, 2, tmp_path / "1", recipe=RECIPE, overrides=whole)
    run_ranks(worker, 2, tmp_path / "2", recipe=RECIPE, overrides=parts, stop_after=3)
    two = run_ranks(worker, 2, tmp_path / "3", recipe=RECIPE, overrides=[*parts, "checkpoint.resume=must"])
    for expected, actual in zip(one, two, strict=True):
        assert all(torch.equal(actual["weights"][name], value) for name, value in expected["weights"].items())
        assert all(torch.equal(a, b) for a, b in zip(actual["teacher"], expected["teacher"], strict=True))
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    with_tower = overrides(tmp_path / "parts", demo_folder, train__max_steps=7)
    counts = run_ranks(WORKERS + "built_by_a_run", 2, tmp_path / "4", recipe=RECIPE, overrides=with_tower)
    assert all(counts), "a run may also go on with the tower, and then has one"
    without = [*overrides(tmp_path / "parts", demo_folder, train__max_steps=8), *keys(features)]
    assert run_ranks(WORKERS + "built_by_a_run", 2, tmp_path / "5", recipe=RECIPE, overrides=without) == [0, 0]


def test_damaged_rows_are_counted_and_listed(tmp_path: Path, demo_folder: Path, features: Path) -> None:
    """On two ranks. Catches rows that are trained on though their checksum is wrong."""
    damaged = Path(shutil.copytree(features, tmp_path / "features"))
    content = json.loads((damaged / "train/features.json").read_text())
    made_of = {name: value for name, value in content["made_of"].items() if name != "precision"}
    index = open_features(damaged / "train", open_dataset(demo_folder / "train"), made_of, "", "").index
    rows = bytearray((damaged / "train/shard-000000.rows").read_bytes())
    numbers = (5, 23)
    for number in numbers:
        rows[2 * content["width"] * int(index["first"][number])] ^= 1
    (damaged / "train/shard-000000.rows").write_bytes(rows)
    settings = [*overrides(tmp_path, demo_folder, data__max_bad_fraction=0.2), *keys(damaged)]
    run_ranks("tests.distributed.workers_run:train", 2, tmp_path / "1", recipe=RECIPE, overrides=settings)
    plan = SamplePlan(open_dataset(demo_folder / "train").shard_sizes, seed=0, lanes=8, global_batch=16)
    expected = sum(int(n) in numbers for step in range(6) for n in plan.samples(step, 0, 1))
    trained = [line["metrics"] for line in lines(tmp_path / "demo/metrics.jsonl") if "lr" in line.get("metrics", {})]
    assert trained[-1]["data/skipped"] == expected > 0
    listed = lines(tmp_path / "demo/quarantine.jsonl")
    assert {line["number"] for line in listed} == set(numbers)
    assert all("the bytes are not those that were written" in line["reason"] for line in listed)


def test_a_mismatch_of_each_kind_is_refused_before_anything_is_loaded(
    tmp_path: Path, demo_folder: Path, features: Path
) -> None:
    """Catches features of other data, of another tower, of other image settings, and parts that are missing."""
    other = Path(shutil.copytree(demo_folder / "model", tmp_path / "model"))
    weights = load_file(other / "model.safetensors")
    name = next(name for name in weights if name.endswith("visual.merger.mlp.2.bias"))
    weights[name][0] += 0.25
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    cut = Path(shutil.copytree(features, tmp_path / "cut"))
    (cut / "train/shard-000000.rows").write_bytes(b"")
    (cut / "held_out/features.json").unlink()
    base = overrides(tmp_path, demo_folder)
    wrong: dict[str, list[str]] = {
        "data.features: {f}/held_out: made with data = ": [f"data.features={features / 'held_out'}"],
        "data.eval_features: {f}/train: made with data = ": [f"data.eval_features={features / 'train'}"],
        "data.features: {f}/train: made with tower = ": [f"model.path={other}"],
        "data.features: {f}/train: made with images.max_pixels = 1003520 (here 6272)": ["data.max_image_pixels=6272"],
        "data.features: {f}/train: made with images.blank = False (here True)": ["data.blank_images=true"],
        "data.features: {t}/cut/train/shard-000000.rows: has 0 bytes": [f"data.features={cut / 'train'}"],
        "data.eval_features: {t}/cut/held_out/features.json: cannot be": [f"data.eval_features={cut / 'held_out'}"],
        "data.features: {t}/none/features.json: cannot be read": [f"data.features={tmp_path / 'none'}"],
        "model.random_init: the vision tower is drawn at random": ["model.random_init=true"],
    }
    changes = [[*base, *keys(features), *change] for change in wrong.values()]
    [messages] = run_ranks(WORKERS + "refusals", 1, tmp_path / "1", recipe=RECIPE, changes=changes)
    for expected, message in zip(wrong, messages, strict=True):
        assert message.startswith(expected.format(f=features, t=tmp_path)), message
        assert "\n" not in message and len(message) < 700
        assert "random_init" in message or f"ilvr-ds encode --config {RECIPE} --shards {demo_folder}" in message


def test_a_mismatch_ends_with_code_2(tmp_path: Path, demo_folder: Path, features: Path) -> None:
    settings: list[Any] = [*overrides(tmp_path / "out", demo_folder), *keys(features), "data.max_image_pixels=6272"]
    sets = [word for value in settings for word in ("--set", value)]
    run = forks.run("ilvr_ds.cli", "train", "--config", RECIPE, *sets)
    assert run.returncode == 2 and "Traceback" not in run.stderr
    assert run.stderr.splitlines()[-1].startswith("ilvr-ds: error: data.features: ")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["mlflow.db"], "nothing but what the test put there"
