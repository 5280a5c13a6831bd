"""What only two GPUs can show: NCCL between the ranks gives what one GPU gives, and a lost rank ends the other."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from ilvr_ds.checkpoint import reshard
from ilvr_ds.cli import main
from tests.distributed.test_faults import ALIVE_S, AT, LIMIT_S, assert_same_states, finish, last_line
from tests.distributed.test_runs import losses, overrides
from tests.ranks import ROOT, free_port, rank_environment
from tests.recipes import RECIPE

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

ON_A_GPU = {
    "DS_ACCELERATOR": "cuda",
    "NVIDIA_TF32_OVERRIDE": "0",  # cuDNN's convolutions would round by 1e-3, otherwise for each number of images
    "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
}
LORA = ["model.lora_rank=4"]
BF16 = ["train.precision=bf16"]
EXACT, ROUNDED = (1e-4, 1e-3), (0.02, 0.2)
"""How far two GPUs may be from one, relative: the numbers of each step; the mean gradient of any one weight at the end.

EXACT: fp32, sums in another order. Measured on a CPU: noise of 1e-7 in all matrix products, as much as fp32 rounds,
moves numbers in six steps by 1e-6 and gradients by 4e-6 at most; ten times as much by 3e-5 and 1e-4; TF32 in the
tower's convolution alone moves numbers by up to 1e-3. A gradient of 32 elements that one rank loses in one step is 9 %
of its weight's mean, while no number moves by more than 3e-5. ROUNDED: bf16; noise of 1e-3 moves numbers by 2e-3 and
gradients by 3 %."""
WITHOUT_OVERLAP = {"overlap_comm": False}
"""Where these alone are right, one stream did not wait for another."""
SMALL_BUCKETS = {"reduce_bucket_size": 10_000}
"""Head and embedding are larger; the other weights fill several buckets, in turns. Those of the files hold them all."""
CASES: dict[str, tuple[str, dict[str, Any], list[str], tuple[float, float]]] = {
    "zero1": ("zero1", {}, [], EXACT),
    "zero1_small_buckets": ("zero1", SMALL_BUCKETS, [], EXACT),
    "zero2": ("zero2", {}, [], EXACT),
    "zero2_without_overlap": ("zero2", WITHOUT_OVERLAP, [], EXACT),
    "zero2_small_buckets": ("zero2", SMALL_BUCKETS, [], EXACT),
    "zero2_small_buckets_without_overlap": ("zero2", SMALL_BUCKETS | WITHOUT_OVERLAP, [], EXACT),
    "zero2_small_buckets_bf16": ("zero2", SMALL_BUCKETS, BF16, ROUNDED),
    "zero3": ("zero3", {}, [], EXACT),
    "bf16": ("zero3", {}, BF16, ROUNDED),
    "teacher_on_the_device": ("zero3", {}, ["teacher.offload=none"], EXACT),
    "negatives": ("zero3", {}, ["loss.contrastive_negatives=world"], EXACT),
    "features": ("zero2", {}, [], EXACT),
    "lora": ("zero2", {}, LORA, EXACT),
    "nf4": ("zero2", {}, [*LORA, *BF16, "model.lora_base=nf4"], ROUNDED),
    "stage2": ("zero2", {}, ["train.stage=2"], EXACT),
    "stage2_whole_chain": ("zero3", {}, ["train.stage=2", "train.latent_gradient=full"], EXACT),
}
"""File of ds_configs, what is changed in it, settings of the recipe, and the limits."""


def start(folder: Path, demo: Path, fault: str, rank: int, world: int, *settings: str) -> list[subprocess.Popen[bytes]]:
    """A rank on each of `world` GPUs, without a launcher; `fault` strikes `rank`, if there is one."""
    is_whole = "loss.contrastive_negatives=world" in settings  # one micro-batch of one rank has them all
    changes = {"run__rank_timeout_s": ALIVE_S if rank < world else 60,
               "checkpoint__every_steps": 2, "data__num_workers": 1,
               "train__micro_batch_size": 8 // world if is_whole else 4,
               "train__grad_accum_steps": 1 if is_whole else 2 // world}  # fmt: skip
    sets = [word for value in [*overrides(folder, demo, **changes), *settings] for word in ("--set", value)]
    command = [sys.executable, "-m", "tests.distributed.faulty", fault, str(rank), str(AT), "train"]
    port, started = free_port(), []
    for number in range(world):
        environment = rank_environment(number, world, port) | ON_A_GPU
        log = (folder / f"log-{number}").open("wb")
        started.append(subprocess.Popen([*command, "--config", RECIPE, *sets], stdout=log, stderr=log, cwd=ROOT,
                                        env=environment, start_new_session=True))  # fmt: skip
    return started


@pytest.mark.parametrize("case", CASES)
@pytest.mark.timeout(3 * LIMIT_S)
def test_two_gpus_give_what_one_gives(
    case: str, tmp_path: Path, demo_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Losses, gradient norms and the teacher's drift over six steps, and the mean gradient of each weight. Catches
    collectives that NCCL does otherwise than gloo, slices of the teacher in a wrong place, and a wait that is missing
    between streams.

    A line for each case says how far each number is off at most, and in which step. What is wrong first tells where to
    look: losses of step 1 come before all gradients, its gradient norm from their sum over ranks, its drift from
    optimizer and teacher.
    """
    zero, changes, settings, (limit, limit_of_gradients) = CASES[case]
    file = tmp_path / "zero.json"
    stock = json.loads((ROOT / f"ds_configs/{zero}.json").read_text())["zero_optimization"]
    file.write_text(json.dumps({"zero_optimization": stock | changes}))
    settings = [*settings, f"deepspeed.config={file}"]
    if case == "features":
        for split in ("train", "held_out"):
            arguments = ["--model", str(demo_folder / "model"), "--precision", "fp32", "--workers", "0"]
            stored = str(tmp_path / split)
            assert main(["encode", "--shards", str(demo_folder / split), *arguments, "--output", stored]) == 0
        settings = [*settings, f"data.features={tmp_path / 'train'}", f"data.eval_features={tmp_path / 'held_out'}"]
    found = []
    for world in (1, 2):
        folder = tmp_path / str(world)
        folder.mkdir()
        codes = finish(start(folder, demo_folder, "killed", 9, world, *settings), list(range(world)))
        logs = [(folder / f"log-{rank}").read_text()[-3000:] for rank in range(world)]
        assert codes == [0] * world, "\n---\n".join([f"exit codes {codes}", *logs])
        found.append(losses(folder))
    one, two = found
    assert list(one) == list(two) == [1, 2, 3, 4, 5, 6]
    off = {name: [abs(two[step][name] / one[step][name] - 1) for step in one] for name in one[1]}
    gradients = gradients_apart(*(mean_gradients(tmp_path / str(world), int(zero[-1])) for world in (1, 2)))
    worst = [f"{name} {max(steps):.0e} ({steps.index(max(steps)) + 1})" for name, steps in off.items()]
    weight = max(gradients, key=lambda name: gradients[name])
    with capsys.disabled():  # seen at once, also where the machine's time ends before the tests
        print(f"\n{case}: off by {', '.join(worst)}, mean gradient {gradients[weight]:.0e} ({weight})")
    wrong = [
        f"{name} in step {step}: {one[step][name]} on one GPU, {two[step][name]} on two"
        for step in one for name in off if not off[name][step - 1] <= limit
    ]  # fmt: skip
    wrong += [f"gradient of {name}: {x:.0e}" for name, x in gradients.items() if not x <= limit_of_gradients]
    assert not wrong, "\n".join([f"off by more than {limit} ({limit_of_gradients}):", *wrong])


def mean_gradients(folder: Path, stage: int) -> dict[str, torch.Tensor]:
    """Of each weight AdamW's first moment in the last checkpoint, whole and flat: a mean over the gradients so far."""
    reshard._convert(folder / "demo/checkpoints/step-00000006", folder / "universal", stage, 2)
    files = (folder / "universal/zero").glob("*/exp_avg.pt")
    return {file.parent.name: torch.load(file, weights_only=False)["param"].flatten().double() for file in files}


def gradients_apart(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> dict[str, float]:
    assert one and one.keys() == two.keys()
    return {name: float((two[name] - value).norm() / value.norm()) for name, value in sorted(one.items())}


@pytest.mark.parametrize("fault", ["killed", "stopped"])
@pytest.mark.timeout(3 * LIMIT_S)
def test_a_lost_rank_ends_the_other_and_one_gpu_goes_on(fault: str, tmp_path: Path, demo_folder: Path) -> None:
    """Killed or stopped within a step, while the other waits in NCCL: it ends by name, in `run.rank_timeout_s` and what
    looking takes; one GPU goes on from the checkpoint of two."""
    ranks = start(tmp_path, demo_folder, fault, 1, 2, "deepspeed.config=zero3")
    while f"step {AT}" not in (tmp_path / "log-1").read_text() and ranks[1].poll() is None and ranks[0].poll() is None:
        time.sleep(0.05)
    struck = time.monotonic()
    codes = finish(ranks, [0])
    took = time.monotonic() - struck
    print(f"{fault}: the other rank ended after {took:.1f} s")
    assert codes[0] == 1, (tmp_path / "log-0").read_text()[-3000:]
    said = last_line(tmp_path, 0)
    assert re.search(rf"no sign of life from rank 1 on \S+, process \d+: step {AT}, \w+, samples \S+", said), said
    assert took < 3 * ALIVE_S
    codes = finish(start(tmp_path, demo_folder, "killed", 9, 1, "deepspeed.config=zero3"), [0])
    assert codes == [0], (tmp_path / "log-0").read_text()[-3000:]
    assert "going on from " in (tmp_path / "log-0").read_text()
    assert max(losses(tmp_path)) == 6


@pytest.mark.timeout(3 * LIMIT_S)
def test_a_run_that_was_stopped_ends_as_one_that_was_not(tmp_path: Path, demo_folder: Path) -> None:
    """Killed on both GPUs in step 4 and started again: bitwise the same weights, moments and teachers."""
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    assert finish(start(tmp_path / "whole", demo_folder, "killed", 9, 2, "deepspeed.config=zero3"), [0, 1]) == [0, 0]
    finish(start(tmp_path / "killed", demo_folder, "killed", 0, 2, "deepspeed.config=zero3"), [1])
    assert finish(start(tmp_path / "killed", demo_folder, "killed", 9, 2, "deepspeed.config=zero3"), [0, 1]) == [0, 0]
    assert_same_states(*(tmp_path / name / "demo/checkpoints/step-00000006" for name in ("whole", "killed")))
    assert losses(tmp_path / "whole") == losses(tmp_path / "killed")
