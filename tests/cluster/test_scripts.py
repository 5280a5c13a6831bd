"""The other scripts of `launch/slurm/`, in the order of their use: features, a sweep on them, one run's answers."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from ilvr_ds.cli import main
from ilvr_ds.data.shards import open_dataset
from ilvr_ds.ingest.pack import pack
from tests.cluster.jobs import START_S, arguments
from tests.cluster.slurm import Slurm
from tests.cluster.submission import OVER, checkout, sbatch, wait_for_end
from tests.data.packing import contents
from tests.distributed.test_features import keys
from tests.recipes import RECIPE

pytestmark = pytest.mark.cluster
SMALL = ["--gres=none", "--cpus-per-task=1", "--time=20"]
STEPS = 40
RATES = ("0.002", "0.0005")


@pytest.fixture(scope="module")
def data(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo with its training samples in three shards."""
    folder = tmp_path_factory.mktemp("shards")
    pack(demo_folder / "task/train.jsonl", demo_folder / "task", folder / "train", max_samples_per_shard=24)
    for name in ("model", "held_out"):
        (folder / name).symlink_to(demo_folder / name)
    assert len(open_dataset(str(folder / "train")).manifest.shards) == 3
    return folder


@pytest.fixture(scope="module")
def features(slurm: Slurm, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two arrays of `encode.sbatch` wrote: of the training data by two jobs, of the held-out data by one."""
    folder = checkout(tmp_path_factory.mktemp("encode"))
    for split, array in (("train", "0-1"), ("held_out", "0")):
        words = ["--config", RECIPE, "--set", f"model.path={data / 'model'}", "--set", f"data.shards={data / split}"]
        words += ["--workers", "0", "--output", str(folder / split)]
        job = sbatch(slurm, folder, *SMALL, f"--array={array}", "launch/slurm/encode.sbatch", *words)
        wait_for_end(slurm, job)
        logs = "\n".join(log.read_text() for log in sorted(folder.glob(f"slurm-{job}-*.log")))
        assert set(slurm.states(job)) == {"COMPLETED"}, logs
        assert "whole: " in logs
    return folder


def test_features_of_an_array_are_those_of_one_pass(features: Path, data: Path, tmp_path: Path) -> None:
    """Each shard by one of the jobs, and byte for byte as one process writes them."""
    words = ["--config", RECIPE, "--set", f"model.path={data / 'model'}", "--shards", str(data / "train")]
    assert main(["encode", *words, "--workers", "0", "--output", str(tmp_path / "whole")]) == 0
    files = contents(tmp_path / "whole")
    assert {file.name: file.read_bytes() for file in (features / "train").iterdir()} == files
    assert sum(name.endswith(".rows") for name in files) == 3


def test_an_encoding_that_is_warned_is_requeued_and_goes_on(slurm: Slurm, data: Path, tmp_path: Path) -> None:
    """As before its time limit; catches a job that Slurm kills there, and that stays ended."""
    words = ["--config", RECIPE, "--set", f"model.path={data / 'model'}", "--set", f"data.shards={data / 'train'}"]
    words += ["--workers", "0", "--output", str(tmp_path / "features")]
    job = sbatch(slurm, checkout(tmp_path / "run"), *SMALL, "--array=0", "launch/slurm/encode.sbatch", *words)
    deadline = time.monotonic() + START_S
    while f"{job}_0.0 " not in slurm.run("squeue", "-h", "--steps", "-j", job):
        assert time.monotonic() < deadline, slurm.run("squeue")
        time.sleep(0.05)
    slurm.run("scancel", "--batch", "--signal=USR1", f"{job}_0")
    wait_for_end(slurm, job)
    [log] = [path.read_text() for path in (tmp_path / "run").glob(f"slurm-{job}-*.log")]
    assert slurm.states(job) == ["COMPLETED"] and int(slurm.field(job, "Restarts")) == 1, log
    assert (tmp_path / "features/features.json").exists()


def test_an_array_that_would_leave_shards_out_is_refused(slurm: Slurm, tmp_path: Path) -> None:
    """Jobs 1 and 2 would take parts 1 and 2 of 2."""
    job = sbatch(slurm, checkout(tmp_path), *SMALL, "--array=1-2", "launch/slurm/encode.sbatch")
    wait_for_end(slurm, job)
    assert set(slurm.states(job)) == {"FAILED"}
    for log in tmp_path.glob(f"slurm-{job}-*.log"):
        assert "take --array=0-N, or set PARTS" in log.read_text()


@pytest.fixture(scope="module")
def sweep(slurm: Slurm, data: Path, features: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two learning rates on the stored features, side by side on a node each; the last job is told to make room, whose
    number is that of the array, too."""
    folder = checkout(tmp_path_factory.mktemp("sweep"))
    (folder / "settings.txt").write_text("".join(f"optim.lr={rate} optim.warmup_steps=2\n" for rate in RATES))
    words = arguments(folder, data, train__max_steps=STEPS, train__micro_batch_size=8)
    words += [word for key in keys(features) for word in ("--set", key)]
    options = [*SMALL, "--array=1-2", "--nodes=1", "--ntasks-per-node=1"]
    job = sbatch(slurm, folder, *options, "launch/slurm/sweep.sbatch", "settings.txt", *words)
    _wait_for_steps(slurm, folder, job)
    assert slurm.field(f"{job}_2", "JobId") == job
    slurm.run("scancel", "--signal=USR1", f"{job}_2")
    wait_for_end(slurm, job)
    logs = "\n".join(log.read_text()[-3000:] for log in sorted(folder.glob(f"slurm-{job}-*.log")))
    assert set(slurm.states(job)) == {"COMPLETED"}, logs
    (folder / "sweep").write_text(job)
    return folder


def _wait_for_steps(slurm: Slurm, folder: Path, job: str) -> None:
    """Return when the last job of the array has made a step."""
    deadline = time.monotonic() + START_S
    record = folder / f"sweep-{job}-2/metrics.jsonl"
    while not record.exists() or '"loss/ce"' not in record.read_text():
        assert time.monotonic() < deadline and not set(slurm.states(f"{job}_2")) & set(OVER), slurm.run("squeue")
        time.sleep(0.1)


def test_runs_of_a_sweep_lie_below_one_run(sweep: Path) -> None:
    """One parent, though both started at once and one started again; each with its own line of the settings."""
    from mlflow import MlflowClient

    job = (sweep / "sweep").read_text()
    client = MlflowClient(tracking_uri=f"sqlite:///{sweep / 'mlflow.db'}")
    runs: dict[str, Any] = {
        run.info.run_name: run for run in client.search_runs([client.get_experiment_by_name("demo").experiment_id])
    }
    assert sorted(runs) == [f"sweep-{job}", f"sweep-{job}-1", f"sweep-{job}-2"]
    parent = runs.pop(f"sweep-{job}").info.run_id
    for number, rate in enumerate(RATES, start=1):
        run = runs[f"sweep-{job}-{number}"]
        assert run.info.status == "FINISHED"
        assert run.data.tags["mlflow.parentRunId"] == parent
        assert run.data.tags["attempt"] == ("2" if number == 2 else "1")
        assert float(run.data.params["optim.lr"]) == float(rate) and run.data.params["optim.warmup_steps"] == "2"
        points = client.get_metric_history(run.info.run_id, "loss/ce")
        assert sorted(point.step for point in points) == list(range(1, STEPS + 1))


def test_a_run_is_answered_and_scored_on_two_nodes(slurm: Slurm, sweep: Path, data: Path, tmp_path: Path) -> None:
    job = (sweep / "sweep").read_text()
    model = tmp_path / "model"
    assert main(["export", str(sweep / f"sweep-{job}-1"), "--to", str(model)]) == 0
    words = ["--model", str(model), "--shards", str(data / "held_out"), "--benchmark", "comt"]
    words += ["--batch-size", "4", "--max-new-tokens", "24"]
    options = [*SMALL, "--nodes=2", "--ntasks-per-node=1"]
    evaluation = sbatch(slurm, checkout(tmp_path / "run"), *options, "launch/slurm/evaluate.sbatch", *words)
    wait_for_end(slurm, evaluation)
    log = (tmp_path / f"run/slurm-{evaluation}.log").read_text()
    assert slurm.states(evaluation) == ["COMPLETED"], log
    folder = model / "evaluation/comt"
    answers = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [answer["number"] for answer in answers] == list(range(16)), log
    assert all((folder / f"part-0000{rank}.jsonl").read_text() for rank in range(2)), "both ranks answered"
    assert (folder / "scores.json").exists() and "accuracy" in log


def test_an_evaluation_that_a_signal_stops_is_requeued_and_goes_on(slurm: Slurm, data: Path, tmp_path: Path) -> None:
    """As before its time limit: what was answered is kept, and answered once."""
    output = tmp_path / "out"
    words = ["--model", str(data / "model"), "--shards", str(data / "held_out"), "--benchmark", "comt"]
    words += ["--batch-size", "1", "--max-new-tokens", "400", "--output", str(output)]
    options = [*SMALL, "--nodes=2", "--ntasks-per-node=1"]
    job = sbatch(slurm, checkout(tmp_path / "run"), *options, "launch/slurm/evaluate.sbatch", *words)
    log = tmp_path / f"run/slurm-{job}.log"
    part, deadline = output / "part-00000.jsonl", time.monotonic() + START_S
    while not part.exists() or not part.read_text():
        assert time.monotonic() < deadline and not set(slurm.states(job)) & set(OVER), log.read_text()
        time.sleep(0.05)
    slurm.run("scancel", "--batch", "--signal=USR1", job)
    wait_for_end(slurm, job)
    said = log.read_text()
    assert slurm.states(job) == ["COMPLETED"] and int(slurm.field(job, "Restarts")) == 1, said
    assert "stopped by a signal; " in said and (output / "scores.json").exists()
    lines = [json.loads(line) for part in output.glob("part-*.jsonl") for line in part.read_text().splitlines()]
    assert sorted(line["number"] for line in lines) == list(range(16))
