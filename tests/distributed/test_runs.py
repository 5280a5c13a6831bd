"""Whole runs: the demo learns its text, a stopped run goes on exactly, the launcher starts ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.stand_ins import save
from tests.ranks import ROOT, free_port, heeding_ctrl_c, run_ranks
from tests.recipes import RECIPE
from tests.stores import with_tables


def overrides(folder: Path, demo: Path, **changes: Any) -> list[str]:
    values = {
        "run.output_dir": with_tables(folder),
        "data.shards": demo / "train",
        "data.eval_shards": demo / "held_out",
        "model.path": demo / "model",
        "train.max_steps": 6,
        "train.micro_batch_size": 4,
        "train.grad_accum_steps": 2,
        "tracking.every_steps": 1,
        "evaluation.max_samples": 8,
        "checkpoint.every_steps": 0,
        "tracking.picture_samples": 0,
        **{key.replace("__", "."): value for key, value in changes.items()},
    }
    return [f"{key}={value}" for key, value in values.items()]


def losses(folder: Path) -> dict[int, dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "demo/metrics.jsonl").read_text().splitlines()]
    names = ("loss/ce", "loss/alignment", "loss/contrastive", "grad/norm", "lr", "teacher/drift")
    return {
        line["step"]: {n: line["metrics"][n] for n in names if n in line["metrics"]}
        for line in lines
        if "loss/ce" in line.get("metrics", {})
    }


def assert_same_losses(found: dict[int, dict[str, float]], expected: dict[int, dict[str, float]]) -> None:
    assert sorted(found) == sorted(expected)
    for step, values in expected.items():
        for name, value in values.items():
            assert found[step][name] == pytest.approx(value, rel=1e-4, abs=1e-6), (step, name)


def check_speed(folder: Path) -> None:
    """Every log interval has its rates, and shares that are whole; a CPU has no MFU."""
    lines = [json.loads(line).get("metrics", {}) for line in (folder / "demo/metrics.jsonl").read_text().splitlines()]
    for metrics in (metrics for metrics in lines if "loss/ce" in metrics):
        assert metrics["speed/tokens_per_s"] > metrics["speed/samples_per_s"] > 0 and "speed/mfu" not in metrics
        shares = {name.rpartition("/")[2]: value for name, value in metrics.items() if "/share/" in name}
        assert sum(shares.values()) == pytest.approx(1) and min(shares.values()) >= 0
        assert min(shares[name] for name in ("data", "vision", "teacher", "selection", "optimizer", "momentum")) > 0
        assert min(shares[name] for name in ("forward", "backward")) > 0.01


def launcher(settings: list[str]) -> tuple[list[str], dict[str, str]]:
    """The command line of the README with two ranks, and its environment."""
    folder = Path(sys.executable).parent
    sets = [word for value in settings for word in ("--set", value)]
    command = [
        str(folder / "deepspeed"),
        "--num_gpus",
        "2",
        "--master_port",
        str(free_port()),
        "launch/train.sh",
        "--config",
        RECIPE,
        *sets,
    ]
    return command, {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{folder}:{os.environ['PATH']}"}


@pytest.mark.parametrize(
    ("stop_after", "workers"),
    [(3, 2), *(pytest.param(k, w, marks=pytest.mark.drill) for k, w in ((3, 0), (4, 2), (4, 0), (1, 2), (5, 0)))],
)
def test_resume_is_bitwise_equal(tmp_path: Path, demo_folder: Path, stop_after: int, workers: int) -> None:
    """Stopped after some of 6 steps (2 ranks, an epoch of 4) and gone on: nothing differs."""
    worker = "tests.distributed.workers_run:train"
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    one = run_ranks(worker, 2, tmp_path / "1", recipe=RECIPE, overrides=overrides(whole, demo_folder))
    settings = overrides(parts, demo_folder, data__num_workers=workers)
    stopped = run_ranks(worker, 2, tmp_path / "2", recipe=RECIPE, overrides=settings, stop_after=stop_after)
    assert [result["finished"] for result in stopped] == [False, False]
    assert not torch.equal(stopped[0]["weights"]["model.lm_head.weight"], one[0]["weights"]["model.lm_head.weight"])
    two = run_ranks(worker, 2, tmp_path / "3", recipe=RECIPE, overrides=[*settings, "checkpoint.resume=must"])
    for expected, actual in zip(one, two, strict=True):
        for kind in ("weights", "moments"):
            for name, tensor in expected[kind].items():
                assert torch.equal(actual[kind][name], tensor), (kind, name)
        assert all(torch.equal(a, b) for a, b in zip(actual["teacher"], expected["teacher"], strict=True))
        assert actual["loader"] == expected["loader"]
        assert torch.equal(actual["random"], expected["random"])
    assert losses(whole) == losses(parts)


def test_a_signal_to_one_rank_stops_all_after_the_same_step(tmp_path: Path, demo_folder: Path) -> None:
    """Schedulers and people signal a process, not a job. Catches a rank that leaves alone, and others that wait."""
    worker = "tests.distributed.workers_run:train_until_a_signal"
    settings = overrides(tmp_path, demo_folder, train__grad_accum_steps=1)
    ranks = run_ranks(worker, 2, tmp_path / "1", timeout_s=120, recipe=RECIPE, overrides=settings, rank=1, step=2)
    assert [rank["finished"] for rank in ranks] == [False, False] and ranks[0]["loader"] == ranks[1]["loader"]
    assert [path.name for path in (tmp_path / "demo/checkpoints").iterdir()] == ["step-00000002"]


def test_a_skipped_step_moves_neither_student_nor_teacher(tmp_path: Path, demo_folder: Path) -> None:
    """Catches a teacher that follows where nothing was learnt: it would close up on a student that stands still."""
    worker = "tests.distributed.workers_run:states_around_a_skipped_step"
    settings = overrides(tmp_path, demo_folder, train__grad_accum_steps=1, train__max_steps=3)
    for states in run_ranks(worker, 2, tmp_path / "1", recipe=RECIPE, overrides=settings, rank=1, step=2):
        before, skipped, after = states
        assert [state["skipped"] for state in states] == [0, 1, 1]
        for kind in ("student", "teacher"):
            assert all(map(torch.equal, skipped[kind], before[kind])), kind
            assert not all(map(torch.equal, after[kind], skipped[kind])), kind


def test_a_run_from_another_runs_checkpoint_is_a_run_of_its_own(tmp_path: Path, demo_folder: Path) -> None:
    """Catches two runs that write into one of MLflow's, which refuses the second one's settings."""
    worker = "tests.distributed.workers_run:train"
    settings = overrides(tmp_path, demo_folder, train__max_steps=1)
    run_ranks(worker, 1, tmp_path / "1", recipe=RECIPE, overrides=settings)
    [checkpoint] = (tmp_path / "demo/checkpoints").iterdir()
    more = ["run.name=other", f"checkpoint.resume={checkpoint}", "train.max_steps=2"]
    run_ranks(worker, 1, tmp_path / "2", recipe=RECIPE, overrides=[*settings, *more])
    copies = [json.loads((tmp_path / name / "mlflow.json").read_text()) for name in ("demo", "other")]
    assert copies[0]["run_id"] and copies[1]["run_id"] not in (None, copies[0]["run_id"])
    assert copies[1]["described"]


def test_going_back_branches_off_and_a_requeue_stays_on_it(tmp_path: Path, demo_folder: Path) -> None:
    """Catches a restart with the same arguments that goes back again, and curves in which two ways are mixed."""
    worker = "tests.distributed.workers_run:train"
    settings = overrides(tmp_path, demo_folder, train__max_steps=2, checkpoint__every_steps=1)
    run_ranks(worker, 1, tmp_path / "1", recipe=RECIPE, overrides=settings)
    folder = tmp_path / "demo"
    first, ways = losses(tmp_path), []
    back = [*settings, f"checkpoint.resume={folder}/checkpoints/step-00000001", "optim.lr=0.01"]
    for number in ("2", "3"):
        run_ranks(worker, 1, tmp_path / number, recipe=RECIPE, overrides=back)
        ways.append((losses(tmp_path), json.loads((folder / "mlflow.json").read_text())["run_id"]))
    assert ways[0] == ways[1], "the second start finds nothing to do"
    assert ways[0][0][1] == first[1] and ways[0][0][2]["lr"] != first[2]["lr"]
    left = json.loads((folder / "mlflow.1.json").read_text())
    assert ways[0][1] not in (None, left["run_id"])
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-00000001", "step-00000002"]


@pytest.mark.parametrize("background", [True, False])
def test_a_last_checkpoint_that_cannot_be_written_ends_the_run(
    tmp_path: Path, demo_folder: Path, background: bool
) -> None:
    """Catches one that is a warning where training waits for it: the run would end as if it were saved."""
    worker = "tests.distributed.workers_run:mistake"
    settings = overrides(tmp_path, demo_folder, train__max_steps=1, checkpoint__background=background)
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo/checkpoints").write_text("a file where the folder should be")
    [found] = run_ranks(worker, 1, tmp_path / "1", recipe=RECIPE, overrides=settings)
    assert found.startswith("the checkpoint after step 1 could not be written: ")


def test_ranks_agree_on_a_checkpoint_that_one_of_them_cannot_read(tmp_path: Path) -> None:
    """Catches ranks that go on from different checkpoints, with every collective in step."""
    path = save(tmp_path / "run/checkpoints", 1)
    found = run_ranks("tests.distributed.workers_run:fault_seen_by_one_rank", 2, tmp_path / "1", path=str(path))
    assert found[0] == found[1] == f"{path}/state.json: damaged (OSError)"


def test_a_signal_while_the_last_checkpoint_is_written_does_not_cost_it(tmp_path: Path, demo_folder: Path) -> None:
    """Catches handlers that are gone by then: the launcher's SIGTERM after a Ctrl-C, Slurm's after its warning."""
    worker = "tests.distributed.workers_run:handlers_while_saving"
    settings = overrides(tmp_path / "run", demo_folder, train__max_steps=1)
    [found] = run_ranks(worker, 1, tmp_path / "1", recipe=RECIPE, overrides=settings)
    assert len(found) >= 2 and all(found)


@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_changed_settings_of_the_optimizer_count_from_the_resume_on(
    tmp_path: Path, demo_folder: Path, zero: str
) -> None:
    """Catches settings that are announced and not applied: DeepSpeed brings back those of the checkpoint."""
    worker = "tests.distributed.workers_run:train"
    settings = overrides(tmp_path / "run", demo_folder, deepspeed__config=f"{ROOT}/ds_configs/{zero}.json")
    run_ranks(worker, 1, tmp_path / "1", recipe=RECIPE, overrides=settings, stop_after=1)
    changed = [
        "optim.weight_decay=0.3",
        "optim.beta2=0.9",
        "optim.eps=1e-6",
        "optim.max_grad_norm=7",
        "train.max_steps=2",
    ]
    [result] = run_ranks(worker, 1, tmp_path / "2", recipe=RECIPE, overrides=[*settings, *changed])
    assert result["clip_grad"] == 7
    for group in result["optimizer"]:
        assert group == {"betas": (0.9, 0.9), "eps": 1e-6, "weight_decay": 0.3}


@pytest.mark.parametrize("stage", [1, 2])
def test_micro_batches_filled_by_tokens_are_the_same_steps(stage: int, tmp_path: Path, demo_folder: Path) -> None:
    """Samples change rank and micro-batch, the step does not, also between one rank and two. Catches a step that ends
    early or late, a sample that is left out or seen twice, losses that are means of micro-batches, and gradients that
    are divided by ranks or micro-batches, which Adam forgives; and it goes on from its checkpoint."""
    worker = "tests.distributed.workers_run:train"
    equal, filled = tmp_path / "equal", tmp_path / "filled"
    settings = overrides(equal, demo_folder, data__packing=False, train__grad_accum_steps=4, train__stage=stage)
    run_ranks(worker, 1, tmp_path / "1", recipe=RECIPE, overrides=settings)
    settings = overrides(filled, demo_folder, train__micro_batch_tokens=512, train__stage=stage)
    run_ranks(worker, 2, tmp_path / "2", recipe=RECIPE, overrides=settings, stop_after=3)
    run_ranks(worker, 2, tmp_path / "3", recipe=RECIPE, overrides=[*settings, "checkpoint.resume=must"])
    expected, found = losses(equal), losses(filled)
    assert all({"grad/norm", "teacher/drift"} <= set(values) for values in expected.values())
    assert sorted(expected) == [1, 2, 3, 4, 5, 6]
    assert_same_losses(found, expected)


def test_rehearsal_changes_nothing(tmp_path: Path, demo_folder: Path) -> None:
    """Catches a rehearsal whose zero gradient, random numbers or counters reach the run."""
    worker = "tests.distributed.workers_run:train"
    results = []
    for name in ("with", "without"):
        settings = overrides(tmp_path / name, demo_folder, train__max_steps=2, train__grad_accum_steps=1)
        function = worker if name == "with" else worker + "_unrehearsed"
        results.append(run_ranks(function, 2, tmp_path / f"ranks-{name}", recipe=RECIPE, overrides=settings)[0])
    for name, tensor in results[0]["weights"].items():
        assert torch.equal(results[1]["weights"][name], tensor), name


@pytest.mark.drill
@pytest.mark.timeout(600)
def test_demo_through_the_launcher(tmp_path: Path, demo_folder: Path) -> None:
    """`deepspeed --num_gpus 2 launch/train.sh` as the README has it: CE falls to half, the teacher moves."""
    changes = {
        "train__max_steps": 60,
        "train__grad_accum_steps": 1,
        "tracking__every_steps": 10,
        "tracking__picture_samples": 1,
    }
    command, environment = launcher(overrides(tmp_path, demo_folder, **changes))
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=540)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    curve = losses(tmp_path)
    first, last = curve[min(curve)], curve[max(curve)]
    assert last["loss/ce"] < first["loss/ce"] / 2
    assert last["teacher/drift"] > 0
    check_speed(tmp_path)
    assert f"look at it: ilvr-ds ui {tmp_path}/demo" in run.stderr + run.stdout
    assert (tmp_path / "demo/checkpoints/step-00000060/state.json").is_file()


def test_ctrl_c_through_the_launcher_saves(tmp_path: Path, demo_folder: Path) -> None:
    """One Ctrl-C reaches every process, and DeepSpeed's launcher then sends SIGTERM too: neither may cost the step."""
    command, environment = launcher(overrides(tmp_path, demo_folder, train__max_steps=500, data__num_workers=1))
    with (tmp_path / "log").open("w") as log:
        run = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True,
                               preexec_fn=heeding_ctrl_c)  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while "step 3/" not in (tmp_path / "log").read_text():
            assert run.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.2)
        os.killpg(run.pid, signal.SIGINT)
        run.wait(60)
        deadline = time.monotonic() + 30  # the launcher may leave before its ranks
        while "checkpoint saved" not in (tmp_path / "log").read_text():
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.2)
    finally:
        subprocess.run(["pkill", "-9", "-g", str(run.pid)], check=False)
    saved = list((tmp_path / "demo/checkpoints").glob("step-????????"))
    assert len(saved) == 1
    step = int(saved[0].name[-8:])
    assert 3 <= step < 500
    assert max(losses(tmp_path)) == step


def test_launcher_hands_on_the_exit_code(tmp_path: Path, demo_folder: Path) -> None:
    """A mistake in the recipe ends with code 2 and one line, also behind `bash launch/train.sh`."""
    _, environment = launcher([])
    command = ["bash", "launch/train.sh", "--config", RECIPE, "--set", "loss.ce_weigth=1"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    output = run.stdout + run.stderr
    assert run.returncode == 2, output[-3000:]
    assert "unknown key 'loss.ce_weigth'; did you mean 'loss.ce_weight'?" in output
    assert "Traceback" not in output
