"""Every program in this folder runs its smallest case on the CPU: what is not run breaks unseen."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import forks
from tests.ranks import ROOT

PROGRAMS = {
    "step": ["--cpu", "--cases", "comt,mixed+features", "--steps", "1", "--repeats", "1", "--workers", "1",
             "--micro-batch", "2", "--accum", "1", "--samples", "8"],
    "stage2": ["--geometry", "tiny", "--layers", "1", "--tokens", "120", "--micro-batches", "1", "--repeats", "1"],
    "decode": ["--geometry", "tiny", "--side", "84", "--prompt", "60", "--context", "80", "--rows", "1", "4",
               "--plain-rows", "1", "2", "--samples", "8", "--new", "12", "24"],
    "compiled_layers": ["--geometry", "tiny", "--layers", "1", "--tokens", "1024", "--repeats", "1"],
    "load_memory": ["--ranks", "1"],
    "looking_cost": [],
    "one_card": ["--cpu", "--workers", "1", "--set", "train.micro_batch_size=2", "--set", "train.grad_accum_steps=1",
                 "--set", "data.lanes=2"],
    "selective_ops": ["--device", "cpu", "--seconds", "0.01", "--widths", "64", "--sizes", "8,64", "--no-compiled"],
}  # fmt: skip
LIBRARIES = {
    "chain_model", "decode_model", "geometry", "gpu_slots", "latents_arms", "latents_data", "latents_operations",
    "latents_settings", "latents_table", "noise", "step_run", "step_table", "syncs", "timeline",
}  # fmt: skip
AUDIT_COST = [
    "--cpu", "--samples", "8", "--batch-size", "4", "--max-new-tokens", "24", "--chain", "4", "--latent-size", "2",
]  # fmt: skip
LEARNING = [
    "--size", "tiny", "--precision", "fp32", "--samples", "128", "--held-out", "64", "--steps", "2", "--batch", "64",
    "--control-steps", "1", "--workers", "1", "--control-workers", "1",
]  # fmt: skip
LATENTS = [
    "--size", "tiny", "--precision", "fp32", "--samples", "64", "--held-out", "32", "--steps", "2",
    "--second-steps", "1", "--batch", "32", "--together", "1", "--workers", "1", "--draw-workers", "2",
]  # fmt: skip


def run_program(name: str, *arguments: str) -> str:
    """What the program prints."""
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    result = forks.run(f"tests.bench.{name}", *arguments, env=environment, timeout=560)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout


@pytest.mark.drill
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_runs_and_prints_a_table(name: str, tmp_path: Path) -> None:
    folder = ["--folder", str(tmp_path)] if name in ("step", "one_card") else []
    assert len(run_program(name, *PROGRAMS[name], *folder).splitlines()) >= 2


@pytest.mark.drill
def test_the_cost_of_an_audit_is_measured_on_answers_that_have_segments() -> None:
    printed = run_program("audit_cost", *AUDIT_COST)
    assert "answers of 24 tokens with 3.0 whole segments of 2 latents" in printed
    assert "| all |" in printed and "verdict" not in printed.casefold(), "the audit's own page is not in the table"


@pytest.mark.drill
@pytest.mark.timeout(600)
def test_the_learning_experiment_and_what_reads_its_run(tmp_path: Path) -> None:
    assert "held-out accuracy" in run_program("learning", "--output", str(tmp_path), *LEARNING)
    assert (tmp_path / "learning.png").stat().st_size > 5_000
    printed = run_program("selected_cells", str(tmp_path / "runs/seeing"))
    assert "before the first step" in printed and "after the last step (2)" in printed


@pytest.mark.drill
@pytest.mark.timeout(600)
def test_the_experiment_on_latents(tmp_path: Path) -> None:
    arguments = ["--output", str(tmp_path), "--signs", "1", "--arms", "changed@2+detached", "pads", *LATENTS]
    printed = run_program("latents", *arguments)
    assert "| changed@2 | 1 | 2, detached | 1 |" in printed and "| pads | 1 | 1 | 1 |" in printed
    assert run_program("latents", *arguments) == printed, "nothing is done again"


@pytest.mark.drill
@pytest.mark.timeout(600)
def test_the_experiment_on_latents_with_operations_after_learning_to_see(tmp_path: Path) -> None:
    arguments = ["--output", str(tmp_path), "--task", "operations", "--look-steps", "2", "--tests", "replacement"]
    lines = run_program("latents", *arguments, "--arms", "changed", *LATENTS).splitlines()
    assert any(line.startswith("| look | 0 | 1 | 1 |") for line in lines)
    assert any(line.startswith("| changed | 0 | 1 | 1 |") for line in lines)
    assert sum(line.startswith("| changed | 1 | ") for line in lines) == 4, "one line an operation"
    assert (tmp_path / "changed-n0-s0-1.yaml").read_text().count(f"init_from: {tmp_path}/runs/look-n0-s0-1") == 1


def test_no_program_is_left_out() -> None:
    files = {file.stem for file in Path(__file__).parent.glob("*.py") if not file.stem.startswith(("test_", "__"))}
    assert files - LIBRARIES - {"audit_cost", "latents", "learning", "matvec", "selected_cells"} == set(PROGRAMS)


def test_products_are_timed_on_a_gpu_or_not_at_all() -> None:
    """Catches a traceback without a GPU; with one, a program that no longer runs."""
    command = [sys.executable, "-m", "tests.bench.matvec", "--compile", "0"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=560)
    if torch.cuda.is_available():
        assert result.returncode == 0 and "tiles compiled" in result.stdout
    else:
        assert result.returncode == 2 and "error: no GPU is visible" in result.stderr.splitlines()[-1]
