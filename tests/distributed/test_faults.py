"""A rank that dies, hangs or computes nonsense ends the job soon, by name, and the next start goes on."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from subprocess import Popen

import pytest
import torch

from tests.distributed.test_runs import losses, overrides
from tests.forks import Fork
from tests.ranks import start_ranks
from tests.recipes import RECIPE

ALIVE_S = 6
"""`run.rank_timeout_s` of these runs."""
LIMIT_S = 400
"""Start of two ranks on two busy cores with nothing cached, six steps, and the time to find out."""
AT = 4
"""Optimizer step, counted from 1, in which the fault strikes; a checkpoint stands after 2."""


def start(folder: Path, demo: Path, fault: str, rank: int, world: int = 2, **changes: object) -> list[Fork]:
    """Ranks without a launcher that would end the others itself."""
    settings = overrides(
        folder,
        demo,
        **{
            "run__rank_timeout_s": ALIVE_S,
            "checkpoint__every_steps": 2,
            "train__max_skipped_steps": 2,
            "train__grad_accum_steps": 1,
            "data__num_workers": 1,
            **changes,
        },
    )
    sets = [word for value in settings for word in ("--set", value)]
    arguments = ["tests.distributed.faulty", fault, str(rank), str(AT), "train", "--config", RECIPE, *sets]
    return start_ranks(world, folder, *arguments)


def finish(processes: Sequence[Fork | Popen[bytes]], waited_for: list[int]) -> list[int | None]:
    """Exit codes of the ranks that are expected to end; the others are killed afterwards."""
    deadline = time.monotonic() + LIMIT_S
    try:
        for number in waited_for:
            processes[number].wait(max(1, deadline - time.monotonic()))
        return [process.poll() for process in processes]
    finally:
        for process in processes:
            os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
            process.wait()


def last_line(folder: Path, rank: int) -> str:
    return (folder / f"log-{rank}").read_text().strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("fault", "rank"),
    [
        ("killed", 1),
        *(pytest.param(*case, marks=pytest.mark.drill) for case in (("killed", 0), ("stopped", 0), ("stopped", 1))),
    ],
)
def test_a_lost_rank_ends_the_job_with_its_name(tmp_path: Path, demo_folder: Path, fault: str, rank: int) -> None:
    """Catches a job that waits for ever, or one whose log does not say which rank, step and samples."""
    codes = finish(start(tmp_path, demo_folder, fault, rank), [1 - rank])
    assert codes[1 - rank] == 1, (tmp_path / f"log-{1 - rank}").read_text()[-3000:]
    said = last_line(tmp_path, 1 - rank)
    if rank == 1:
        assert re.search(rf"no sign of life from rank 1 on \S+, process \d+: step {AT}, student, samples \S+", said)
    else:
        assert re.search(r"rank 0 does not answer|no sign of life from rank 0", said)
        assert re.search(rf"\[rank 1\] step {AT}, \S+, samples", (tmp_path / "log-1").read_text())


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        pytest.param(
            "out_of_memory",
            rf"rank 1 on .*: step {AT}, student, samples \S+.*: RuntimeError: .*memory",
            marks=pytest.mark.drill,
        ),
        pytest.param(
            "no_worker", r"rank 1 on .*: step \d, .*: RuntimeError: DataLoader worker", marks=pytest.mark.drill
        ),
        pytest.param(
            "hanging",
            rf"nothing moved for 15 s; furthest behind: .*rank 1 on .*: step {AT}, student",
            marks=pytest.mark.drill,
        ),
    ],
)
def test_a_failing_rank_ends_the_job_with_its_reason(tmp_path: Path, demo_folder: Path, fault: str, says: str) -> None:
    """The reason stands in the last line of both ranks: whoever reads one log finds it."""
    codes = finish(start(tmp_path, demo_folder, fault, 1, run__stall_timeout_s=15, train__max_steps=40), [0, 1])
    assert codes == [1, 1], (tmp_path / "log-0").read_text()[-3000:] + (tmp_path / "log-1").read_text()[-3000:]
    assert re.search(says, last_line(tmp_path, 0)), last_line(tmp_path, 0)
    assert re.search(says, last_line(tmp_path, 1)), last_line(tmp_path, 1)


def assert_same_states(one: Path, other: Path) -> None:
    """Two checkpoints hold bitwise the same weights, moments and teachers."""
    states = sorted(path.relative_to(one) for path in one.rglob("*optim_states.pt"))
    teachers = sorted(path.name for path in one.glob("teacher-rank-*.safetensors"))
    assert states and teachers
    for file in states:
        stored = [torch.load(folder / file, weights_only=False)["optimizer_state_dict"] for folder in (one, other)]
        assert torch.equal(*(state["fp32_flat_groups"][0] for state in stored))
        moments = [state["optimizer_state_dict"]["state"][0] for state in stored]
        assert all(torch.equal(moments[0][key], moments[1][key]) for key in ("exp_avg", "exp_avg_sq", "step"))
    for name in teachers:
        assert (one / name).read_bytes() == (other / name).read_bytes()


@pytest.mark.drill
@pytest.mark.timeout(600)
def test_a_run_killed_inside_a_window_ends_as_one_that_was_not(tmp_path: Path, demo_folder: Path) -> None:
    """kill -9 in the second of two micro-batches of step 4, then a start as a scheduler makes it: bitwise the same."""
    changes = {"train__grad_accum_steps": 2}
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    assert finish(start(tmp_path / "whole", demo_folder, "killed", 9, **changes), [0, 1]) == [0, 0]
    finish(start(tmp_path / "killed", demo_folder, "killed_late", 0, **changes), [1])
    assert finish(start(tmp_path / "killed", demo_folder, "killed", 9, **changes), [0, 1]) == [0, 0]
    assert "going on from " in (tmp_path / "killed/log-0").read_text()
    assert_same_states(*(tmp_path / name / "demo/checkpoints/step-00000006" for name in ("whole", "killed")))
    assert losses(tmp_path / "whole") == losses(tmp_path / "killed")


def test_gradients_that_stay_infinite_end_the_job_and_the_next_start_goes_on(tmp_path: Path, demo_folder: Path) -> None:
    """Steps 4 and 5 are skipped and counted; then the run stops, naming samples. Catches NaN in weights or teacher."""
    assert finish(start(tmp_path, demo_folder, "not_a_number", 1), [0, 1]) == [1, 1]
    log = (tmp_path / "log-1").read_text()
    named = re.search(r"step 5: the gradients were not finite in 2 steps in a row .*: samples (\S+)", log)
    assert named, log[-3000:]
    assert "step 4: the loss is not finite; samples " in log
    record = [json.loads(line) for line in (tmp_path / "demo/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in record if line.get("event") == "skipped_step"] == [4, 5]
    taken = {line["step"]: line["metrics"] for line in record if "optimizer/skipped_steps" in line.get("metrics", {})}
    assert "loss/ce" in taken[3] and "loss/ce" not in taken[4], "of a skipped step there is no loss"
    assert taken[3]["optimizer/skipped_steps"] == 0 and taken[4]["optimizer/skipped_steps"] == 1
    assert finish(start(tmp_path, demo_folder, "not_a_number", 9), [0, 1]) == [0, 0]
    assert "going on from " in (tmp_path / "log-0").read_text()
    assert (tmp_path / "demo/checkpoints/step-00000006/state.json").is_file()
