from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from ilvr_ds.checkpoint.compatible import check_fits, commit_of_base
from ilvr_ds.checkpoint.files import saved_state
from ilvr_ds.config import ModelConfig, OptimConfig, SelectionConfig, TrackingConfig
from ilvr_ds.errors import UserError
from tests.checkpoint.stand_ins import recipe, save


def test_another_batch_is_a_mistake_and_the_right_one_is_named(folder: Path) -> None:
    path = save(folder, 1)
    state = saved_state(path)
    state["loader"]["samples per step"] = 4
    (path / "state.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match=r"4 samples a step, this job has 1 rank .*; set train.grad_accum_steps=4"):
        check_fits(path, recipe(folder, "auto"))


def test_a_setting_that_weights_depend_on_is_a_mistake(folder: Path) -> None:
    now = dataclasses.replace(recipe(folder, "auto"), model=ModelConfig(latent_size=4))
    with pytest.raises(UserError, match=r"made with model\.latent_size = 8, this run has 4; go on with the old value"):
        check_fits(save(folder, 1), now)


def test_the_scale_of_adapters_is_fixed_where_there_are_some(folder: Path) -> None:
    """Catches a resumed model whose adapters count otherwise than they were trained to."""
    path = save(folder, 1)
    other = ModelConfig(lora_alpha=1.0)
    check_fits(path, dataclasses.replace(recipe(folder, "auto"), model=other))
    state = saved_state(path)
    state["recipe"]["model"]["lora_rank"] = 4
    (path / "state.json").write_text(json.dumps(state))
    now = dataclasses.replace(recipe(folder, "auto"), model=dataclasses.replace(other, lora_rank=4))
    with pytest.raises(UserError, match=r"made with model\.lora_alpha = .*, this run has 1\.0; go on with"):
        check_fits(path, now)


def test_other_settings_that_changed_are_named(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches a run that goes on with another rate in silence, and warnings about where files lie."""
    now = dataclasses.replace(recipe(folder, "must"), optim=OptimConfig(lr=0.5), tracking=TrackingConfig(every_steps=3))
    with caplog.at_level("WARNING", logger="ilvr_ds"):
        assert check_fits(save(folder, 7), now)["loader"]["step"] == 7
    assert [record.getMessage() for record in caplog.records] == [
        "going on with other settings: the checkpoint was made with optim.lr = 1e-05, this run has 0.5"
    ]


def test_keys_that_a_checkpoint_does_not_know_yet_had_their_defaults(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches warnings of None for each key that a newer version has, in which others would drown."""
    path = save(folder, 7)
    state = saved_state(path)
    for key in ("compare", "order"):
        del state["recipe"]["selection"][key]
    (path / "state.json").write_text(json.dumps(state))
    now = dataclasses.replace(recipe(folder, "must"), selection=SelectionConfig(order="place"))
    check_fits(path, now)
    assert caplog.messages == [
        "going on with other settings: the checkpoint was made with selection.order = score, this run has place"
    ]


CHANGED = SelectionConfig(pool="changed", by="change")
WITHOUT = dataclasses.replace(CHANGED, unchanged="none")


def test_a_run_may_go_on_without_its_teacher(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The average is of no more use: the student and its optimizer are whole."""
    path = save(folder, 7)
    state = saved_state(path)
    state["recipe"]["selection"] |= {"pool": "changed", "by": "change"}
    (path / "state.json").write_text(json.dumps(state))
    check_fits(path, dataclasses.replace(recipe(folder, "must"), selection=WITHOUT))
    assert caplog.messages == [
        "going on with other settings: the checkpoint was made with selection.unchanged = query, this run has none"
    ]


def test_a_run_without_a_teacher_does_not_go_on_with_one(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Catches a teacher that would begin in the middle as a copy of the student."""
    path = save(folder, 7)
    state = saved_state(path)
    state["files"] = {name: sums for name, sums in state["files"].items() if not name.startswith("teacher")}
    state["recipe"]["selection"] |= {"pool": "changed", "by": "change", "unchanged": "none"}
    (path / "state.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match=r"made without a teacher; go on with selection.unchanged=none, or name it in "):
        check_fits(path, dataclasses.replace(recipe(folder, "must"), selection=CHANGED))
    assert not caplog.messages
    assert check_fits(path, dataclasses.replace(recipe(folder, "must"), selection=WITHOUT)) == state
    assert not caplog.messages


def test_the_commit_is_pinned_where_the_name_is_the_same(tmp_path: Path) -> None:
    """Of the checkpoint's run; none where it had a folder, another name, or was made before commits were kept."""
    for state, pinned in (({"model_commit": "abc"}, "abc"), ({"model_commit": None}, None), ({}, None)):
        (tmp_path / "state.json").write_text(json.dumps({"recipe": {"model": {"path": "org/name"}}, **state}))
        assert commit_of_base(tmp_path, "org/name") == pinned
        assert commit_of_base(tmp_path, "org/other") is None
    assert commit_of_base(None, "org/name") is None
