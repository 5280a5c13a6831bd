from __future__ import annotations

import json
from pathlib import Path

import pytest

from ilvr_ds.config import recipe_from_dict
from tests.config.mistakes import MINIMAL, Load


def test_stage_2_packs_but_for_a_rollout_with_gradients(load: Load) -> None:
    assert load().packs and not load("", "data.packing=false").packs
    for gradient, packs in (("detached", True), ("3", True), ("full", False)):
        assert load("train: {stage: 2}", f"train.latent_gradient={gradient}").packs == packs


def test_stage_2_has_a_teacher_where_a_loss_asks_for_one(load: Load) -> None:
    """Stage 1 always has: its student reads what the teacher selects."""
    free = load("train: {stage: 2}")
    assert free.has_teacher and free.train.latent_gradient == "detached"
    none = ["loss.align_weight=0", "loss.contrastive_weight=0"]
    assert load("", *none).has_teacher and not load("train: {stage: 2}", *none).has_teacher
    assert load("train: {stage: 2}", none[0]).has_teacher and load("train: {stage: 2}", none[1]).has_teacher


def test_where_only_change_decides_there_are_targets_and_no_teacher(load: Load) -> None:
    alone = ["selection.pool=changed", "selection.by=change", "selection.unchanged=none"]
    for stage in ("1", "2"):
        recipe = load("", f"train.stage={stage}", *alone)
        assert recipe.has_targets and not recipe.has_teacher
        assert load("", f"train.stage={stage}", *alone[:2]).has_teacher


def test_a_recipe_survives_json(load: Load) -> None:
    recipe = load("optim: {lr: 3e-4}\nmodel: {path: m, lora_targets: [q_proj]}", text=MINIMAL.replace("model", "#"))
    assert recipe_from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_the_run_folder_is_absolute(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load("", "run.output_dir=out").run_dir == tmp_path / "out" / "r"
