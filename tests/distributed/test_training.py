"""Training on real ranks: the teacher follows exactly, layouts do not matter, unequal ranks never wait in vain."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from ilvr_ds.model.student import DTYPES
from tests.ranks import run_ranks
from tests.runs import ZERO3

PERSISTENT = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 10**6}}
ZERO1, ZERO2 = ({"zero_optimization": {"stage": stage}} for stage in (1, 2))
OFFLOADED = {"zero_optimization": {**ZERO3["zero_optimization"], "offload_optimizer": {"device": "cpu"}}}
NEEDS_FP16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_fp16_supported(), reason="DeepSpeed takes fp16 only on a CPU that computes in it"
)
WORKERS = "tests.distributed.workers:"


@pytest.mark.parametrize(
    ("world", "zero", "model", "offload", "precision"),
    [
        (2, PERSISTENT, {}, "cpu", "fp32"),
        (2, ZERO2, {}, "none", "fp32"),
        (2, ZERO3, {"lora_rank": 4}, "cpu", "fp32"),
        (2, ZERO3, {"lora_rank": 4, "lora_base": "nf4"}, "cpu", "fp32"),
        (2, ZERO1, {"lora_rank": 4}, "cpu", "fp32"),
        (2, ZERO2, {"lora_rank": 4, "lora_base": "nf4"}, "none", "fp32"),
        (3, ZERO3, {}, "cpu", "fp32"),
        (2, ZERO3, {}, "cpu", "bf16"),
        (3, ZERO2, {}, "cpu", "bf16"),
        (2, ZERO1, {}, "cpu", "bf16"),
    ],
    ids=[
        "zero3-persistent-student",
        "zero2",
        "lora",
        "qlora",
        "lora-zero1",
        "qlora-zero2",
        "three-ranks-with-padding",
        "zero3-bf16",
        "zero2-bf16-three-ranks",
        "zero1-bf16",
    ],
)
def test_teacher_equals_dense_average(
    world: int, zero: dict[str, Any], model: dict[str, Any], offload: str, precision: str, tmp_path: Path
) -> None:
    """Catches shards that do not match, an update at the wrong time or in bf16, and a forward with old weights."""
    arguments = {"steps": 10, "zero": zero, "model": model, "offload": offload, "precision": precision}
    for result in run_ranks(WORKERS + "momentum", world, tmp_path, **arguments):
        assert result["moved"] > 1e-4
        assert result["average_error"] < 1e-6
        assert result["published_error"] == 0
        assert result["forward_error"] < 1e-5 < 1e-3 < result["stale_error"]


def test_the_teacher_reads_a_window_in_pieces(tmp_path: Path) -> None:
    """Catches pieces that differ from the whole, and a number of calls that depends on a rank's samples."""
    for results in run_ranks(WORKERS + "teacher_in_pieces", 2, tmp_path, at_once=[1, 4, 6, 2]):
        assert [result["calls"] for result in results] == [6, 2, 1, 3]
        assert all(result["error"] < 1e-5 for result in results)
        assert results[2]["error"] == 0


def test_zero3_has_hooks_around_layers_and_not_within(tmp_path: Path) -> None:
    """Within they cost the host more than the device needs for the work; a version of DeepSpeed may forget the mark.

    In the teacher's last layer they stay: its projections are called by themselves too.
    """
    ((student, teacher),) = run_ranks(WORKERS + "hooked_modules", 1, tmp_path)
    layers = [name for name in student if name.startswith("layers.")]
    assert layers == [f"layers.{number}" for number in range(len(layers))] and len(layers) > 1
    assert {"norm", "embed_tokens"} <= set(student) & set(teacher)
    within = {name for name in teacher if name.startswith("layers.")} - set(layers)
    assert f"{layers[-1]}.self_attn.q_proj" in within
    assert all(name.startswith(f"{layers[-1]}.") for name in within)


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=NEEDS_FP16)])
def test_half_precision_learns(precision: str, tmp_path: Path) -> None:
    """Catches gradients lost in the low precision, and a precision of the recipe that DeepSpeed is not told."""
    arguments = {"optimizers": ["adamw"], "offload": False, "steps": 10, "precision": precision}
    for (result,) in run_ranks(WORKERS + "trained_by", 2, tmp_path, **arguments):
        assert result["dtype"] == DTYPES[precision]
        assert all(map(math.isfinite, result["losses"]))
        assert result["losses"][-1] < 0.9 * result["losses"][0]


@pytest.mark.parametrize("grad_accum_steps", [1, 2])
@pytest.mark.parametrize("zero", [ZERO1, ZERO2, OFFLOADED], ids=["zero1", "zero2", "zero3-offload"])
def test_zero_loss_before_the_first_step_adds_nothing(
    zero: dict[str, Any], grad_accum_steps: int, tmp_path: Path
) -> None:
    """The rehearsal's backward without a step; catches one that counts as a micro-batch or leaves a gradient."""
    arguments = {"zero": zero, "grad_accum_steps": grad_accum_steps}
    for plain, rehearsed in run_ranks(WORKERS + "with_and_without_rehearsal", 2, tmp_path, **arguments):
        for name, weight in plain.items():
            assert torch.equal(rehearsed[name], weight), name


@pytest.mark.parametrize("zero", [ZERO3, ZERO2], ids=["zero3", "zero2"])
def test_layout_does_not_matter(zero: dict[str, Any], tmp_path: Path) -> None:
    """2 ranks x micro-batch 2 x accumulation 2 is 1 rank x 8: catches wrong normalisation and noise tied to layout."""
    two = weights_after(tmp_path, [[[2, 2]], [[2, 2]]], zero=zero)
    one = weights_after(tmp_path, [[[8]]], zero=zero)
    check_same(one, two)


@pytest.mark.parametrize("zero", [ZERO3, OFFLOADED, ZERO2, ZERO1], ids=["zero3", "zero3-offload", "zero2", "zero1"])
def test_packed_micro_batches_of_any_size_are_padded_ones(zero: dict[str, Any], tmp_path: Path) -> None:
    """Packed on 2 ranks, with more and fewer samples and micro-batches from step to step and rank to rank, is padded
    on 1 rank: catches attention across samples, and a step that ends at another micro-batch than its last."""
    uneven = weights_after(tmp_path, [[[1, 2], [4], [1, 1, 3]], [[2, 3], [4], [1, 1, 1]]], zero=zero)
    padded = weights_after(tmp_path, [[[8]]], packing=False, zero=ZERO3 if zero is OFFLOADED else zero)
    check_same(padded, uneven)


def test_negatives_of_the_world_are_those_of_one_large_micro_batch(tmp_path: Path) -> None:
    """Catches a rank's own candidates, the target among them, that come back as those of other ranks, as a sample does
    that both ranks have."""
    arguments = {"negatives": "world", "batches": [[0, 1, 2, 3], [4, 5, 0]]}
    ranks = run_ranks(WORKERS + "feature_losses", 2, tmp_path / "2", **arguments)
    arguments = {"negatives": "micro_batch", "batches": [[0, 1, 2, 3, 4, 5, 0]]}
    [one] = run_ranks(WORKERS + "feature_losses", 1, tmp_path / "1", **arguments)
    arguments["negatives"] = "segment"
    [alone] = run_ranks(WORKERS + "feature_losses", 1, tmp_path / "0", **arguments)
    assert one["contrastive"] > alone["contrastive"] * 1.01, "the samples' candidates must count"
    for name in ("contrastive", "alignment", "ce", "slots"):
        assert [rank[name] for rank in ranks] == pytest.approx([one[name]] * 2, rel=1e-5), name


def weights_after(folder: Path, sizes: list[list[list[int]]], packing: bool = True, **more: Any) -> dict[str, Any]:
    arguments = {"steps": 5, "sizes": sizes, "packing": packing, **more}
    return run_ranks(WORKERS + "weights_after", len(sizes), folder / f"{len(sizes)}", **arguments)[0]


def check_same(one: dict[str, Any], two: dict[str, Any]) -> None:
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
    for name, weight in one["weights"].items():
        # Adam divides by the root of the second moment: an element whose gradient is near its rounding moves by up
        # to the whole rate either way, so weights are compared as tensors, not element by element
        error = (weight - two["weights"][name]).norm() / weight.norm()
        assert float(error) < 1e-5, name


def test_memory_choices_change_no_gradient(tmp_path: Path) -> None:
    """Under ZeRO-3, on ranks with different numbers of chunks: catches weights that are gone in the second forward, a
    head that is gathered for each chunk, and biases that the second forward adds again."""
    choices = [("none", 1024), ("full", 1024), ("selective", 7)]
    ranks = run_ranks(WORKERS + "with_choices", 2, tmp_path, choices=choices, zero=ZERO3)
    assert -(-ranks[0][0]["labels"] // 7) != -(-ranks[1][0]["labels"] // 7)
    plain, *others = ranks[0]
    assert len(plain["grads"]) > 30
    for other in others:
        assert other["loss"] == pytest.approx(plain["loss"], rel=1e-6)
        for name, grad in plain["grads"].items():
            assert float((other["grads"][name] - grad).norm() / grad.norm()) < 1e-5, name


@pytest.mark.parametrize(
    ("rows", "negatives"), [("packed", "world"), pytest.param("left", "micro_batch", marks=pytest.mark.drill)]
)
def test_mixed_batches_never_hang(rows: str, negatives: str, tmp_path: Path) -> None:
    """Catches any module call or collective that depends on what a rank's samples hold."""
    arguments = {"steps": 50, "rows": rows, "negatives": negatives}
    check_mixed(run_ranks(WORKERS + "mixed_batches", 2, tmp_path, **arguments), 50)


@pytest.mark.drill
@pytest.mark.timeout(1200)
def test_mixed_batches_never_hang_for_long(tmp_path: Path) -> None:
    """On four ranks, each with draws of its own; twice the steps of the short ones."""
    arguments = {"steps": 100, "rows": "packed", "negatives": "world"}
    check_mixed(run_ranks(WORKERS + "mixed_batches", 4, tmp_path, timeout_s=1100, **arguments), 100)


def check_mixed(ranks: list[dict[str, Any]], steps: int) -> None:
    """Every rank took every step and made the same calls of modules and collectives."""
    for rank in ranks:
        assert len(rank["losses"]) == steps
        assert all(map(math.isfinite, rank["losses"]))
        assert rank["losses"][-1] < rank["losses"][0]
        assert rank["calls"] == ranks[0]["calls"]
    assert ranks[0]["calls"]["student "] == 2 * steps and ranks[0]["calls"]["teacher "] == steps
