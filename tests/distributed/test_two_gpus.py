"""What only two GPUs can show: NCCL between the ranks gives what one GPU gives, and a lost rank ends the other."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

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
LORA = ["model.lora_rank=4", "deepspeed.config=zero2"]
EXACT, ROUNDED = 1e-4, 0.02
"""How far losses may be apart: sums in fp32 in another order; roundings of bf16."""
CASES = {
    "zero1": (["deepspeed.config=zero1"], EXACT),
    "zero2": (["deepspeed.config=zero2"], EXACT),
    "zero2_without_overlap": ([], EXACT),
    "zero3": (["deepspeed.config=zero3"], EXACT),
    "bf16": (["deepspeed.config=zero3", "train.precision=bf16"], ROUNDED),
    "teacher_on_the_device": (["deepspeed.config=zero3", "teacher.offload=none"], EXACT),
    "negatives": (["deepspeed.config=zero3", "loss.contrastive_negatives=world"], EXACT),
    "features": (["deepspeed.config=zero2"], EXACT),
    "lora": (LORA, EXACT),
    "nf4": ([*LORA, "model.lora_base=nf4", "train.precision=bf16"], ROUNDED),
    "stage2": (["deepspeed.config=zero2", "train.stage=2"], EXACT),
    "stage2_whole_chain": (["deepspeed.config=zero3", "train.stage=2", "train.latent_gradient=full"], EXACT),
}


def start(folder: Path, demo: Path, fault: str, rank: int, world: int, *settings: str) -> list[subprocess.Popen[bytes]]:
    """A rank on each of `world` GPUs, without a launcher; `fault` strikes `rank`, if there is one."""
    is_whole = "loss.contrastive_negatives=world" in settings  # one micro-batch of one rank has them all
    changes = {"run__rank_timeout_s": ALIVE_S, "checkpoint__every_steps": 2, "data__num_workers": 1,
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
def test_two_gpus_give_what_one_gives(case: str, tmp_path: Path, demo_folder: Path) -> None:
    """Losses, gradient norms and the teacher's drift, over six steps. Catches collectives that NCCL does otherwise than
    gloo, slices of the teacher in a wrong place, and a wait that is missing between streams."""
    settings, tolerance = CASES[case]
    if case == "zero2_without_overlap":  # if this one alone is right, a stream did not wait for another
        file = tmp_path / "zero2.json"
        zero2 = json.loads((ROOT / "ds_configs/zero2.json").read_text())
        file.write_text(json.dumps({"zero_optimization": zero2["zero_optimization"] | {"overlap_comm": False}}))
        settings = [f"deepspeed.config={file}"]
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
        assert codes == [0] * world, (folder / "log-0").read_text()[-3000:]
        found.append(losses(folder))
    one, two = found
    assert list(one) == list(two) == [1, 2, 3, 4, 5, 6]
    for step in one:
        print(case, step, one[step], two[step])
        assert two[step] == pytest.approx(one[step], rel=tolerance), step


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
