"""Runs on data that lies: counted, listed once, the same end on all ranks."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient

from ilvr_ds.data.plan import SamplePlan
from ilvr_ds.data.shards import open_dataset
from tests.data.hostile import HOSTILE, members_of, plant, sample_bytes
from tests.distributed.test_runs import launcher, overrides
from tests.ranks import ROOT, run_ranks
from tests.recipes import RECIPE

LIES = {5: "image of 900 megapixels", 23: "pickled member", 40: "bad JSON"}


@pytest.fixture
def lying(demo_folder: Path, tmp_path: Path) -> Path:
    """The demo with three samples of the training data and one of the held-out data that lie."""
    folder = Path(shutil.copytree(demo_folder, tmp_path / "demo-data"))
    for number, lie in LIES.items():
        plant(folder / "train", number, HOSTILE[lie](members_of(sample_bytes(folder / "train", number))))
    plant(folder / "held_out", 2, HOSTILE["symlink"](members_of(sample_bytes(folder / "held_out", 2))))
    return folder


def expected_skips(folder: Path, steps: int) -> int:
    """How often the plan of six steps of 16 samples meets the lies."""
    plan = SamplePlan(open_dataset(folder / "train").shard_sizes, seed=0, lanes=8, global_batch=16)
    return sum(int(number) in LIES for step in range(steps) for number in plan.samples(step, 0, 1))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def mlflow_metrics(folder: Path) -> dict[str, float]:
    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    [run] = client.search_runs([client.get_experiment_by_name("demo").experiment_id])
    return run.data.metrics


def test_stand_ins_add_nothing(tmp_path: Path) -> None:
    """Catches a stand-in with a label, a slot or a weight in a mean; rank 1 has nothing else."""
    results = run_ranks("tests.distributed.workers_data:with_and_without_stand_ins", 2, tmp_path)
    for alone, mixed in results:
        assert mixed["counts"] == alone["counts"]
        assert mixed["loss"] == pytest.approx(alone["loss"], rel=1e-6)
        for name, gradient in alone["grads"].items():
            error = (mixed["grads"][name] - gradient).norm() / gradient.norm().clamp(min=1e-12)
            assert float(error) < 1e-5, name  # padding to another length sums in another order
            assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_are_counted_and_listed_once(workers: int, tmp_path: Path, lying: Path) -> None:
    """Stopped after three of six steps and gone on: catches totals that start anew and lines that come twice."""
    settings = overrides(tmp_path, lying, data__max_bad_fraction=0.2, data__num_workers=workers)
    worker = "tests.distributed.workers_run:train"
    run_ranks(worker, 2, tmp_path / "1", recipe=RECIPE, overrides=settings, stop_after=3)
    results = run_ranks(worker, 2, tmp_path / "2", recipe=RECIPE, overrides=[*settings, "checkpoint.resume=must"])
    assert [result["finished"] for result in results] == [True, True]
    logged = {line["step"]: line["metrics"] for line in lines(tmp_path / "demo/metrics.jsonl") if "metrics" in line}
    trained = [line["metrics"] for line in lines(tmp_path / "demo/metrics.jsonl") if "lr" in line.get("metrics", {})]
    assert [m["data/skipped"] for m in trained] == [expected_skips(lying, step) for step in range(1, 7)]
    assert logged[6]["eval/skipped"] == 1
    listed = lines(tmp_path / "demo/quarantine.jsonl")
    train = {line["number"]: line for line in listed if line["location"] == str(lying / "train")}
    assert len(listed) == 4 and train.keys() == LIES.keys()
    index = open_dataset(lying / "train").index
    assert all(line["offset"] == index["offset"][number] for number, line in train.items())
    assert {line["shard"] for line in listed} == {"shard-000000.tar"}
    assert mlflow_metrics(tmp_path)["data/skipped"] == expected_skips(lying, 6)
    assert "900000000 pixels" in train[5]["reason"] and ".pkl' at byte" in train[23]["reason"]


@pytest.mark.parametrize(("fraction", "saved"), [(0.0, False), (0.02, True)])
def test_too_many_bad_samples_end_the_run_on_every_rank(
    fraction: float, saved: bool, tmp_path: Path, lying: Path
) -> None:
    """Catches ranks that come to different decisions. At 0 no step with a doubtful sample is kept."""
    settings = overrides(tmp_path, lying, data__max_bad_fraction=fraction, train__max_steps=50)
    worker = "tests.distributed.workers_data:train_until_refused"
    messages = run_ranks(worker, 2, tmp_path / "1", recipe=RECIPE, overrides=settings)
    assert len(set(messages)) == 1
    assert messages[0].startswith("data.max_bad_fraction: ") and "could not be used" in messages[0]
    assert "quarantine.jsonl, the last: " in messages[0] and "\n" not in messages[0]
    assert bool(list((tmp_path / "demo/checkpoints").glob("step-*"))) == saved


def test_held_out_data_that_cannot_be_read_costs_no_training(tmp_path: Path, demo_folder: Path) -> None:
    """Catches a run that ends by it, as it should, and leaves nothing of what it has learnt."""
    folder = Path(shutil.copytree(demo_folder, tmp_path / "demo-data"))
    plant(folder / "held_out", 2, HOSTILE["symlink"](members_of(sample_bytes(folder / "held_out", 2))))
    settings = overrides(
        tmp_path, folder, data__max_bad_fraction=0, evaluation__every_steps=2, checkpoint__every_steps=100
    )
    worker = "tests.distributed.workers_data:train_until_refused"
    messages = run_ranks(worker, 2, tmp_path / "1", recipe=RECIPE, overrides=settings)
    assert len(set(messages)) == 1
    assert messages[0].startswith("data.max_bad_fraction: 1 of ") and "held_out could not be used" in messages[0]
    assert [path.name for path in (tmp_path / "demo/checkpoints").glob("step-*")] == ["step-00000002"]


@pytest.mark.drill
def test_the_launcher_hands_on_code_2(tmp_path: Path, lying: Path) -> None:
    """With a loader worker. One plain line, no traceback, and the record says how it ended."""
    settings = overrides(tmp_path, lying, data__max_bad_fraction=0, data__num_workers=1, train__max_steps=50)
    command, environment = launcher(settings)
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, check=False)
    output = run.stdout + run.stderr
    assert run.returncode == 2, output[-3000:]
    assert "Traceback" not in output
    assert "ilvr-ds: error: data.max_bad_fraction: " in output
    last = lines(tmp_path / "demo/metrics.jsonl")[-1]
    assert (last["event"], last["status"]) == ("end", "FAILED")
