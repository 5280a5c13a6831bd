"""Runs in which what changed alone decides: the same as with a teacher, without one.

Steps on the golden samples, whole runs on trails: in both each picture differs from the one before.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import make_demo
from tests.distributed.test_runs import overrides
from tests.distributed.test_training import ZERO2
from tests.ranks import ROOT, run_ranks
from tests.recipes import RECIPE
from tests.runs import ZERO3

TRAIN = "tests.distributed.workers_run:train"
FREE = str(ROOT / "launch/recipes/demo-stage2.yaml")
BY_CHANGE = ["selection.pool=changed", "selection.by=change"]
ALONE = [*BY_CHANGE, "selection.unchanged=none"]
OF_TEACHER = {"select/cosine_top1", "teacher/drift", "teacher/momentum"}


@pytest.fixture(scope="module")
def trails(tmp_path_factory: pytest.TempPathFactory) -> Path:
    drawn = ["--operations", "trail", "--signs", "3", "--train", "32", "--held-out", "8"]
    return make_demo(tmp_path_factory.mktemp("trails") / "demo", *drawn)


def settings(folder: Path, trails: Path, *more: str, accum: int = 1) -> list[str]:
    changes = {"train__max_steps": 4, "train__grad_accum_steps": accum, "checkpoint__every_steps": 2}
    return [*overrides(folder, trails, **changes, checkpoint__keep_last=0), *more]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, trails: Path) -> dict[str, Any]:
    """Four steps of stage 1 without a teacher on 2 ranks: what each rank ended with, and the folder."""
    folder = tmp_path_factory.mktemp("alone")
    results = run_ranks(TRAIN, 2, folder / "ranks", recipe=RECIPE, overrides=settings(folder, trails, *ALONE))
    return {"ranks": results, "folder": folder}


def logged(folder: Path, name: str = "demo") -> dict[int, dict[str, float]]:
    """Losses, accuracies and what was selected, by step."""
    found: dict[int, dict[str, float]] = {}
    for line in (folder / name / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        kept = {n: v for n, v in record.get("metrics", {}).items() if n.startswith(KINDS)}
        if kept:
            found.setdefault(record["step"], {}).update(kept)
    return found


KINDS = ("loss/", "eval/", "select/", "teacher/", "grad/", "train/")


def check_same(ranks: list[dict[str, Any]], others: list[dict[str, Any]]) -> None:
    for one, other in zip(ranks, others, strict=True):
        for kind in ("weights", "moments"):
            for name, tensor in one[kind].items():
                assert torch.equal(other[kind][name], tensor), (kind, name)


def check_same_but_for_the_teacher(without: dict[int, dict[str, float]], taught: dict[int, dict[str, float]]) -> None:
    """Every metric to the last bit; what a teacher alone has is not there instead of 0."""
    assert list(without) == list(taught) == [1, 2, 3, 4]
    for step, values in without.items():
        assert taught[step].keys() - values.keys() == OF_TEACHER
        assert values == {name: taught[step][name] for name in values}
        assert values["select/unchanged"] == 0 and values["select/kept_per_segment"] >= 1


def teacher_files(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("teacher-rank*")]


@pytest.mark.parametrize(("stage", "zero"), [(1, ZERO3), (2, ZERO2)], ids=["stage1-zero3", "stage2-zero2"])
def test_steps_are_the_same_without_a_teacher(stage: int, zero: dict[str, Any], tmp_path: Path) -> None:
    """To the last bit: losses, and weights after the optimizer. Catches a part of the step that the teacher touches."""
    arguments = {"stage": stage, "zero": zero, "steps": 2}
    for taught, alone in run_ranks(
        "tests.distributed.workers_teacher:with_and_without_teacher", 2, tmp_path, **arguments
    ):
        assert taught["has_teacher"] and not alone["has_teacher"]
        assert alone["losses"] == taught["losses"] and alone["sums"]["slots"] > 0
        assert alone["sums"] == taught["sums"] | {"cosine_top1": 0.0}
        assert alone["weights"].keys() == taught["weights"].keys()
        assert all(torch.equal(alone["weights"][name], weight) for name, weight in taught["weights"].items())


@pytest.mark.drill
@pytest.mark.timeout(600)
def test_stage_1_is_the_same_without_a_teacher(tmp_path: Path, trails: Path, alone: dict[str, Any]) -> None:
    """Weights, moments, losses of training and evaluation, norms of gradients."""
    taught = run_ranks(TRAIN, 2, tmp_path / "1", recipe=RECIPE, overrides=settings(tmp_path, trails, *BY_CHANGE))
    check_same(alone["ranks"], taught)
    check_same_but_for_the_teacher(logged(alone["folder"]), logged(tmp_path))
    assert [rank["teacher"] for rank in alone["ranks"]] == [[], []] and all(rank["teacher"] for rank in taught)
    checkpoints = sorted(path.name for path in (alone["folder"] / "demo/checkpoints").iterdir())
    assert checkpoints == ["step-00000002", "step-00000004"]
    assert not teacher_files(alone["folder"]) and len(teacher_files(tmp_path)) == 4


@pytest.mark.drill
@pytest.mark.timeout(600)
def test_one_rank_is_two_and_a_killed_run_goes_on_to_the_last_bit(
    tmp_path: Path, trails: Path, alone: dict[str, Any]
) -> None:
    """Killed behind its last checkpoint but one; and it does not go on with a teacher, which would begin there."""
    changes = settings(tmp_path / "one", trails, *ALONE, accum=2)
    [one] = run_ranks(TRAIN, 1, tmp_path / "1", recipe=RECIPE, overrides=changes)
    for name, weight in one["weights"].items():
        if not name.endswith("k_proj.bias"):  # moves no attention: its gradient is rounding, which Adam enlarges
            assert float((weight - alone["ranks"][0]["weights"][name]).norm() / weight.norm()) < 1e-5, name
    for step, values in logged(tmp_path / "one").items():
        assert values == pytest.approx(logged(alone["folder"])[step], rel=1e-4, abs=1e-6)

    killed = tmp_path / "killed"
    shutil.copytree(alone["folder"] / "demo", killed / "demo")
    shutil.rmtree(killed / "demo/checkpoints/step-00000004")
    changes = [*settings(killed, trails, "checkpoint.resume=must"), *BY_CHANGE]
    for said in run_ranks("tests.distributed.workers_run:mistake", 2, tmp_path / "2", recipe=RECIPE, overrides=changes):
        assert "made without a teacher; go on with selection.unchanged=none" in said
    gone_on = run_ranks(TRAIN, 2, tmp_path / "3", recipe=RECIPE, overrides=[*changes, ALONE[-1]])
    check_same(alone["ranks"], gone_on)
    assert all(a["loader"] == b["loader"] for a, b in zip(alone["ranks"], gone_on, strict=True))


@pytest.mark.drill
@pytest.mark.timeout(600)
@pytest.mark.parametrize("gradient", ["detached", "full"])
def test_stage_2_is_the_same_without_a_teacher(
    tmp_path: Path, trails: Path, alone: dict[str, Any], gradient: str
) -> None:
    """Begun from a run without one, whose checkpoint holds no average."""
    more = [f"model.init_from={alone['folder'] / 'demo'}", f"train.latent_gradient={gradient}"]
    runs = {}
    for name, selection in (("taught", BY_CHANGE), ("alone", ALONE)):
        changes = settings(tmp_path / name, trails, *more, *selection)
        runs[name] = run_ranks(TRAIN, 2, tmp_path / f"ranks-{name}", recipe=FREE, overrides=changes)
    check_same(runs["alone"], runs["taught"])
    check_same_but_for_the_teacher(*(logged(tmp_path / name, "demo-stage2") for name in ("alone", "taught")))
    assert not teacher_files(tmp_path / "alone") and teacher_files(tmp_path / "taught")
