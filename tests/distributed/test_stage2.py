"""Stage 2 on real ranks: the authors' numbers, calls in step whatever ranks hold, other runs' weights, exact resume."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.test_golden import TOLERANCE, relative
from tests.distributed.test_resharding import averages
from tests.distributed.test_runs import overrides
from tests.distributed.test_training import ZERO2, check_mixed, check_same, weights_after
from tests.golden_set import golden_set
from tests.ranks import ROOT, run_ranks

WORKERS = "tests.distributed.workers_stage2:"
# without reuse distance: DeepSpeed walks that far along its trace of module calls at every release of a weight, which
# in a small model is the whole trace, and that of stage 2 is long
ZERO3: dict[str, Any] = {
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0}
}
KEPT_WEIGHTS = json.loads((ROOT / "ds_configs/zero3_kept_weights.json").read_text())


def expected(index: int, key: str) -> torch.Tensor:
    """A golden number of stage 2; without segments it is that of stage 1, which is then a plain forward."""
    golden = golden_set()
    name = golden.samples[index].id
    is_free = f"{name}.stage2.ce_loss" in golden.expected
    assert is_free or not golden.settings["samples"][index]["segments"]
    plain = {"hidden": "student_hidden"}.get(key, key)
    return golden.expected[f"{name}.stage2.{key}" if is_free else f"{name}.{plain}"]


@pytest.mark.parametrize(
    ("world", "zero", "checkpointing"),
    [(1, ZERO3, False), (2, ZERO3, False), (2, ZERO3, True), (2, KEPT_WEIGHTS, False), (2, ZERO2, True)],
    ids=["1-zero3", "2-zero3", "2-zero3-checkpointing", "2-zero3-kept-weights", "2-zero2-checkpointing"],
)
def test_golden_numbers(world: int, zero: dict[str, Any], checkpointing: bool, tmp_path: Path) -> None:
    """Loss, hidden states and gradients, one by one and all in one padded micro-batch."""
    golden = golden_set()
    everyone = list(range(len(golden.samples)))
    batches = [everyone] if checkpointing or zero is not ZERO3 else [[i] for i in everyone] + [everyone]
    arguments = {"batches": batches, "zero": zero, "checkpointing": checkpointing}
    for results in run_ranks(WORKERS + "golden_numbers", world, tmp_path, **arguments):
        for batch, result in zip(batches, results, strict=True):
            _check(batch, result, world)


def _check(batch: list[int], result: dict[str, Any], world: int) -> None:
    """Losses and gradients of a batch are means over all of its supervised tokens."""
    golden = golden_set()
    tokens = [int((golden.expected[f"{golden.samples[i].id}.labels"] != -100).sum()) for i in batch]
    for row, i in enumerate(batch):
        real = golden.expected[f"{golden.samples[i].id}.attention_mask"].bool()
        states = expected(i, "hidden")[real].double()
        error = (result["hidden"][row].double() - states).norm(dim=-1) / states.norm(dim=-1)
        assert float(error.max()) < TOLERANCE, golden.samples[i].id
    ce = sum(n * float(expected(i, "ce_loss")) for n, i in zip(tokens, batch, strict=True)) / sum(tokens)
    assert result["sums"]["ce"] / result["sums"]["supervised"] == pytest.approx(ce, rel=TOLERANCE)
    assert world * result["loss"] == pytest.approx(ce, rel=TOLERANCE)
    first = f"{golden.samples[0].id}.stage2.grad."
    names = [key.removeprefix(first) for key in golden.expected if key.startswith(first)]
    assert names
    for key in names:
        mean = sum(n / sum(tokens) * expected(i, f"grad.{key}").double() for n, i in zip(tokens, batch, strict=True))
        assert relative(result["grads"][key.replace("model.", "model.language_model.", 1)], mean) < TOLERANCE, key


@pytest.mark.parametrize(
    ("padding_side", "checkpointing"), [("left", True), pytest.param("right", False, marks=pytest.mark.drill)]
)
def test_ranks_stay_in_step(padding_side: str, checkpointing: bool, tmp_path: Path) -> None:
    """Other samples on every rank, to rows without images, segments or labels: all make the same number of calls.

    Catches a call that only a rank with more segments makes, forward or backward: the others would wait for ever.
    """
    arguments = {"steps": 4, "padding_side": padding_side, "zero": ZERO3, "checkpointing": checkpointing}
    first, second = run_ranks(WORKERS + "mixed_batches", 2, tmp_path, **arguments)
    assert first["calls"] == second["calls"]
    assert first["own"] != second["own"], "the ranks' own samples need different numbers of calls"
    assert first["losses"] == second["losses"]
    assert all(map(math.isfinite, first["losses"]))


@pytest.mark.parametrize(
    ("zero", "gradient"),
    [(ZERO3, "detached"), (ZERO2, 2), pytest.param(ZERO2, "full", marks=pytest.mark.drill)],
    ids=["zero3-detached", "zero2-2", "zero2-full"],
)
def test_layout_does_not_matter_with_a_teacher(zero: dict[str, Any], gradient: str | int, tmp_path: Path) -> None:
    """2 ranks x accumulation 2 is 1 rank x 8: catches wrong counts of slots, and noise tied to layout."""
    settings = {"steps": 3, "zero": zero, "stage": 2, "latent_gradient": gradient}
    two = weights_after(tmp_path, [[[2, 2]], [[1, 3]]], **settings)
    check_same(weights_after(tmp_path, [[[8]]], **settings), two)


@pytest.mark.parametrize(
    ("gradient", "rows", "zero", "checkpointing"),
    [
        ("detached", "packed", ZERO3, "none"),
        (1, "left", ZERO3, "full"),
        pytest.param("full", "right", ZERO3, "full", marks=pytest.mark.drill),
        pytest.param("detached", "packed", ZERO2, "selective", marks=pytest.mark.drill),
    ],
)
def test_ranks_stay_in_step_with_a_teacher(
    gradient: str | int, rows: str, zero: dict[str, Any], checkpointing: str, tmp_path: Path
) -> None:
    """The same with targets, to ranks without any."""
    arguments = {"steps": 6, "rows": rows, "negatives": "world", "zero": zero, "checkpointing": checkpointing}
    ranks = run_ranks(
        "tests.distributed.workers:mixed_batches", 2, tmp_path, is_fresh=checkpointing == "selective", stage=2,
        latent_gradient=gradient, **arguments,
    )  # fmt: skip
    check_mixed(ranks, 6)


RUN = "tests.distributed.workers_run:train"
RECIPES = ROOT / "launch/recipes"


@pytest.fixture(scope="module")
def stage1(tmp_path_factory: pytest.TempPathFactory, demo_folder: Path) -> dict[str, Any]:
    """A short run of stage 1 on 2 ranks under each ZeRO stage: its folder, its weights and its teacher's."""
    folder = tmp_path_factory.mktemp("stage1")
    runs = {}
    for zero in ("zero3", "zero2"):
        settings = overrides(folder / zero, demo_folder, train__max_steps=2, train__grad_accum_steps=1)
        settings += ["data.eval_shards=null", f"deepspeed.config={ROOT / 'ds_configs' / zero}.json"]
        results = run_ranks(RUN, 2, folder / f"ranks-{zero}", recipe=str(RECIPES / "demo.yaml"), overrides=settings)
        runs[zero] = {
            "folder": folder / zero / "demo", "weights": results[0]["weights"], "averages": averages(results),
        }  # fmt: skip
    return runs


def free_settings(folder: Path, demo_folder: Path, start: Path, **changes: Any) -> list[str]:
    return overrides(folder, demo_folder, model__init_from=start, train__max_steps=4, **changes)


def free_run(ranks: int, folder: Path, settings: list[str], stop_after: int = 0) -> list[dict[str, Any]]:
    recipe = str(RECIPES / "demo-stage2.yaml")
    return run_ranks(RUN, ranks, folder, recipe=recipe, overrides=settings, stop_after=stop_after)


@pytest.mark.parametrize(
    ("saved", "ranks", "zero"), [("zero3", 1, "zero2"), ("zero3", 2, "zero3"), ("zero2", 2, "zero2")]
)
def test_starts_from_another_run(
    tmp_path: Path, demo_folder: Path, stage1: dict[str, Any], saved: str, ranks: int, zero: str
) -> None:
    """At rate 0 the weights stay those of the run named, and the teacher's at momentum 1: catches weights mixed up,
    missed, or not on every rank, and a teacher that starts as a copy of the student."""
    changes = {"optim__lr": 0.0, "optim__weight_decay": 0.0, "train__micro_batch_size": 8 // ranks}
    settings = free_settings(tmp_path, demo_folder, stage1[saved]["folder"], train__grad_accum_steps=1, **changes)
    settings += ["train.max_steps=1", "data.eval_shards=null", f"deepspeed.config={ROOT / 'ds_configs' / zero}.json"]
    results = free_run(ranks, tmp_path / "ranks", [*settings, "teacher.momentum=1.0"])
    for result in results:
        assert result["weights"].keys() == stage1[saved]["weights"].keys()
        for name, weight in stage1[saved]["weights"].items():
            assert torch.equal(result["weights"][name], weight), name
    for average, before in zip(averages(results), stage1[saved]["averages"], strict=True):
        size = min(len(average), len(before))  # what follows is padding
        assert torch.equal(average[:size], before[:size])
    assert any(
        not torch.equal(average[: weight.numel()], weight.flatten())
        for average, weight in zip(stage1[saved]["averages"], stage1[saved]["weights"].values(), strict=False)
    ), "the average cannot be told from the student"


PUBLISHED = ["train.latent_gradient=full", "loss.align_weight=0", "loss.contrastive_weight=0"]


@pytest.mark.parametrize("changes", [[], PUBLISHED], ids=["with a teacher", "published"])
def test_resume_is_bitwise_equal(tmp_path: Path, demo_folder: Path, stage1: dict[str, Any], changes: list[str]) -> None:
    """Stopped after 2 of 4 steps and gone on, without the folder that it started from."""
    start = tmp_path / "start"
    shutil.copytree(stage1["zero3"]["folder"], start)
    whole = free_run(2, tmp_path / "1", [*free_settings(tmp_path / "whole", demo_folder, start), *changes])
    settings = [*free_settings(tmp_path / "parts", demo_folder, start), *changes]
    stopped = free_run(2, tmp_path / "2", settings, stop_after=2)
    assert not stopped[0]["finished"]
    shutil.rmtree(start)
    gone_on = free_run(2, tmp_path / "3", [*settings, "checkpoint.resume=must"])
    for expected_rank, actual in zip(whole, gone_on, strict=True):
        for kind in ("weights", "moments"):
            for name, tensor in expected_rank[kind].items():
                assert torch.equal(actual[kind][name], tensor), (kind, name)
        assert (changes == PUBLISHED) == (not actual["teacher"])
        assert all(map(torch.equal, actual["teacher"], expected_rank["teacher"]))
    curves = [metrics(tmp_path / name) for name in ("whole", "parts")]
    assert curves[0] == curves[1]
    assert {"loss/ce", "grad/norm", "eval/ce", "eval/answer_accuracy"} <= curves[0].keys()
    of_teacher = {name for name in curves[0] if name.startswith(("teacher/", "select/")) or "alignment" in name}
    named = {"loss/alignment", "eval/alignment", "teacher/drift", "select/kept_per_segment"}
    assert not of_teacher if changes == PUBLISHED else named <= of_teacher


def test_a_run_without_a_teacher_does_not_go_on_with_one(
    tmp_path: Path, demo_folder: Path, stage1: dict[str, Any]
) -> None:
    """As runs from before stage 2 had one would, whose recipes say nothing of it."""
    settings = free_settings(tmp_path, demo_folder, stage1["zero3"]["folder"], train__grad_accum_steps=1)
    free_run(2, tmp_path / "1", [*settings, *PUBLISHED], stop_after=1)
    recipe = str(RECIPES / "demo-stage2.yaml")
    for said in run_ranks(
        "tests.distributed.workers_run:mistake", 2, tmp_path / "2", recipe=recipe, overrides=settings
    ):
        assert "made without a teacher; go on with loss.align_weight=0 and loss.contrastive_weight=0" in said


def metrics(folder: Path) -> dict[str, list[float]]:
    """The course of every metric that does not depend on the clock or the machine."""
    found: dict[str, list[float]] = {}
    for line in (folder / "demo-stage2/metrics.jsonl").read_text().splitlines():
        for name, value in json.loads(line).get("metrics", {}).items():
            if not name.startswith(("speed/", "memory/", "checkpoint/", "system/", "pictures/")):
                found.setdefault(name, []).append(value)
    return found
