"""What is checked before ranks meet, and what is said of settings that do nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ilvr_ds.config import Recipe, load_recipe
from ilvr_ds.data.tokens import load_tokenizer
from ilvr_ds.errors import UserError
from ilvr_ds.training import run
from ilvr_ds.training.assembly.inputs import Inputs, say_what_does_nothing, say_where_latents_are_new
from tests.data.packing import make_sample, write_shards
from tests.ranks import ROOT

RECIPE = ROOT / "launch/recipes/demo.yaml"


def recipe(demo: Path, *changes: str) -> Recipe:
    data = (f"data.shards={demo / 'train'}", f"data.eval_shards={demo / 'held_out'}", f"model.path={demo / 'model'}")
    return load_recipe(RECIPE, [*data, *changes])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("data.shards={tmp}", "expected a folder that `ilvr-ds pack` wrote"),
        ("data.eval_shards={tmp}", "expected a folder that `ilvr-ds pack` wrote"),
        ("data.max_tokens=50", "data.max_tokens is 50, but "),
        ("data.lanes=3", "data.lanes: 3 does not divide the global batch"),
        (
            "evaluation.max_samples=7",
            r"has 7 samples \(evaluation.max_samples\), of which a step of evaluation takes 8 ",
        ),
        ("train.micro_batch_tokens=50", "train.micro_batch_tokens is 50, but the longest sample has"),
        ("deepspeed.config=zero4", "deepspeed.config: no file 'zero4' .*; did you mean 'zero3'?"),
    ],
)
def test_a_mistake_is_found_before_ranks_meet(
    demo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, words: str
) -> None:
    """Catches one that is told after minutes of compiling."""

    def met(*_: Any) -> None:
        raise AssertionError("it compiles here")

    monkeypatch.setattr(run, "init_process_group", met)
    with pytest.raises(UserError, match=words):
        run.train(recipe(demo_folder, change.format(tmp=tmp_path)), RECIPE)
    with pytest.raises(AssertionError):
        run.train(recipe(demo_folder), RECIPE)


def test_micro_batches_by_tokens_need_lengths(demo_folder: Path) -> None:
    """Catches a dry run that promises what a run then refuses."""
    with pytest.raises(UserError, match=r"train.micro_batch_tokens: the lengths .* are not known; pack them again"):
        Inputs.read(recipe(demo_folder, "model.latent_size=2", "train.micro_batch_tokens=8192"), RECIPE, 1)


def test_lengths_measured_otherwise_do_not_count(demo_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    wanted = recipe(demo_folder, "data.max_tokens=50", "model.latent_size=2")
    inputs = Inputs.read(wanted, RECIPE, 1)
    assert not inputs.are_measured and Inputs.read(recipe(demo_folder), RECIPE, 1).are_measured
    say_what_does_nothing(wanted, inputs, 320)
    for said, split in zip(caplog.messages, ("train", "held_out"), strict=True):
        why = "its lengths were measured with model.latent_size = 4 (here 2) and do not count"
        assert said.startswith(f"{demo_folder / split}: {why}")


@pytest.mark.parametrize("is_mixture", [False, True])
def test_held_out_samples_that_are_too_long_are_found(demo_folder: Path, tmp_path: Path, is_mixture: bool) -> None:
    """Catches an evaluation of stand-ins, and a run that the first one ends. Lengths of training data are made up."""
    write_shards(((sample, 40) for sample in map(make_sample, range(64))), tmp_path / "short")
    sets = [f"data.shards={tmp_path}/short"]
    if is_mixture:
        entry = f"{{path: {tmp_path}/short, name: a, eval_shards: {demo_folder}/held_out}}"
        sets = [f"data.shards=[{entry}]", "data.eval_shards=null"]
    name = "eval_shards of a" if is_mixture else "data.eval_shards"
    with pytest.raises(UserError, match=rf"data.max_tokens is 50, but {name} \(\S+/held_out\) holds a sample of"):
        Inputs.read(recipe(demo_folder, *sets, "data.max_tokens=50"), RECIPE, 1)
    Inputs.read(recipe(demo_folder, *sets), RECIPE, 1)
    Inputs.read(recipe(demo_folder, *sets, "data.max_tokens=50", "model.latent_size=2"), RECIPE, 1)


def test_settings_that_do_nothing_are_named(demo_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    for changes, total, words in (
        (("optim.warmup_steps=7",), 7, []),
        (("optim.warmup_steps=8",), 7, ["optim.warmup_steps is 8, but the run has 7: optim.lr is never reached"]),
        (("evaluation.every_steps=5",), 320, []),
        (
            ("evaluation.every_steps=5", "data.eval_shards=null"),
            320,
            ["evaluation.every_steps is 5, but data.eval_shards is null: nothing is evaluated"],
        ),
        (
            ("selection.pool_size=16", "selection.pool_min=2"),
            320,
            [
                "selection.pool_size is 16, which is for selection.pool: changed; here it is all",
                "selection.pool_min is 2, which is for selection.pool: changed; here it is all",
            ],
        ),
        (("selection.pool_size=16", "selection.pool=changed"), 320, []),
        (
            ("selection.pool=changed", "selection.by=change", "selection.unchanged=none"),
            320,
            ["teacher.momentum is 0.99, but selection.unchanged is none: there is no teacher"],
        ),
        (
            ("optim.min_lr_ratio=0.1", "optim.schedule=constant", "train.latent_gradient=2"),
            320,
            [
                "optim.min_lr_ratio is 0.1, but optim.schedule is constant: optim.lr stays",
                "train.latent_gradient is 2, which is for train.stage 2",
            ],
        ),
    ):
        caplog.clear()
        wanted = recipe(demo_folder, *changes)
        say_what_does_nothing(wanted, Inputs.read(wanted, RECIPE, 1), total)
        assert caplog.messages == words


def test_stage_2_on_a_base_that_knows_no_latents_is_said(
    demo_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a run that feeds a model states which it never learnt to use."""
    say_where_latents_are_new(recipe(demo_folder))
    assert caplog.messages == [], "stage 1 teaches them"
    free = recipe(demo_folder, "train.stage=2")
    say_where_latents_are_new(free)
    [said] = caplog.messages
    assert said.startswith(f"train.stage is 2, but {demo_folder}/model has no latent tokens")
    caplog.clear()
    load_tokenizer(str(demo_folder / "model"))[0].save_pretrained(tmp_path)  # as an export has it
    say_where_latents_are_new(replace(free, model=replace(free.model, path=str(tmp_path))))
    assert caplog.messages == []


def test_a_mixture_is_planned_and_judged_as_a_whole(
    demo_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The two sets of the demo as a mixture; without lengths of one, none count."""
    both = f"[{{path: {demo_folder}/train, weight: 1}}, {{path: {demo_folder}/held_out, weight: 3}}]"
    wanted = recipe(demo_folder, f"data.shards={both}", "data.eval_shards=null", "train.micro_batch_size=8")
    inputs = Inputs.read(wanted, RECIPE, 1)
    assert inputs.training.named == ("train", "held_out") and inputs.are_measured and inputs.held_out is None
    assert inputs.plan.taken(4) == (inputs.plan.global_batch, 3 * inputs.plan.global_batch)
    with pytest.raises(UserError, match=r"data.max_tokens is 50, but \S+ holds a sample of"):
        Inputs.read(replace(wanted, data=replace(wanted.data, max_tokens=50)), RECIPE, 1)
    write_shards(((sample, 0) for sample in map(make_sample, range(8))), tmp_path / "plain")
    more = recipe(demo_folder, f"data.shards=[{demo_folder}/train, {tmp_path}/plain]", "data.eval_shards=null")
    inputs = Inputs.read(more, RECIPE, 1)
    assert inputs.training.longest_tokens == 0 and not inputs.are_measured
    say_what_does_nothing(more, inputs, 1000)
    [said] = caplog.messages
    assert said.startswith(f"lengths of the other data sets do not count, because those in {tmp_path}/plain were not")
