from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from deepspeed.runtime.config import DeepSpeedConfig

from ilvr_ds.config import OptimConfig, Recipe, TrainConfig, load_recipe
from ilvr_ds.engine.settings import deepspeed_settings, read_deepspeed_json, teacher_settings
from ilvr_ds.errors import UserError
from ilvr_ds.model.student import DTYPES

ROOT = Path(__file__).parent.parent.parent
FILES = sorted((ROOT / "ds_configs").glob("*.json"))
RECIPES = sorted((ROOT / "launch" / "recipes").glob("*.yaml"))
TRAIN = TrainConfig(micro_batch_size=3, grad_accum_steps=5, precision="bf16")

every_file = pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)


def mistake(tmp_path: Path, content: Any) -> str:
    file = tmp_path / "zero.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError) as caught:
        read_deepspeed_json(str(file))
    message = str(caught.value)
    assert message.startswith(str(file)) and "\n" not in message
    return message.removeprefix(str(file))


@pytest.mark.parametrize(
    ("key", "owner"),
    [
        ("train_batch_size", "train.micro_batch_size and train.grad_accum_steps"),
        ("train_micro_batch_size_per_gpu", "train.micro_batch_size"),
        ("gradient_accumulation_steps", "train.grad_accum_steps"),
        ("gradient_clipping", "optim.max_grad_norm"),
        ("optimizer", "optim.name"),
        ("scheduler", "optim.schedule"),
        ("bf16", "train.precision"),
        ("fp16", "train.precision"),
        ("activation_checkpointing", "model.activation_checkpointing"),
        ("communication_data_type", "train.gradient_precision"),
        ("data_types", "train.precision and train.gradient_precision"),
    ],
)
def test_a_key_of_the_recipe_is_refused_with_its_name_there(tmp_path: Path, key: str, owner: str) -> None:
    assert mistake(tmp_path, {key: {}}) == f": '{key}' belongs in the recipe, as {owner}; remove it here"
    recipe = Recipe().flat()
    assert all(name in recipe for name in owner.split(" and "))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"zero_optimisation": {}}, ": unknown key 'zero_optimisation'; did you mean 'zero_optimization'?"),
        (
            {"zero_optimization": {"reduce_buckt_size": 1}},
            ": unknown key 'zero_optimization.reduce_buckt_size'; did you mean 'reduce_bucket_size'?",
        ),
        ('{\n"zero_optimization": {}\n', ":3: not valid JSON (Expecting ',' delimiter)"),
        ("", ":1: not valid JSON (Expecting value)"),
        ([], ": expected a JSON object"),
        ({"zero_optimization": 3}, ": zero_optimization: expected a JSON object"),
    ],
)
def test_a_mistake_in_the_file_is_named(tmp_path: Path, content: Any, message: str) -> None:
    assert mistake(tmp_path, content) == message


@pytest.mark.parametrize(
    ("zero", "key"),
    [
        ({"stage": 7}, "stage"),
        ({"stage": "three"}, "stage"),
        ({"offload_optimizer": {"device": "gpu"}}, "offload_optimizer.device"),
        ({"offload_optimizer": {"device": "cpu", "pinned": True}}, "offload_optimizer.pinned"),
    ],
)
def test_a_value_that_deepspeed_does_not_take_is_named(tmp_path: Path, zero: dict[str, Any], key: str) -> None:
    assert mistake(tmp_path, {"zero_optimization": zero}).startswith(f": zero_optimization.{key}: ")


def test_a_missing_file_is_named_with_the_places(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"deepspeed.config: no file 'z.json' \(looked at z.json, {tmp_path}/z.json\)"):
        read_deepspeed_json("z.json", tmp_path)


def test_the_working_directory_comes_before_the_recipes_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder, stage in (("here", 3), ("recipes", 2)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "z.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    recipes = tmp_path / "recipes"
    monkeypatch.chdir(tmp_path / "here")
    assert read_deepspeed_json("z.json", recipes)["zero_optimization"]["stage"] == 3
    monkeypatch.chdir(tmp_path)
    assert read_deepspeed_json("z.json", recipes)["zero_optimization"]["stage"] == 2


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_finds_its_file_from_anywhere(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that was copied elsewhere."""
    monkeypatch.chdir(tmp_path)
    assert read_deepspeed_json(load_recipe(path).deepspeed.config, path.parent)
    copied = Path(shutil.copy(path, tmp_path / "mine.yaml"))
    assert read_deepspeed_json(load_recipe(copied).deepspeed.config, copied.parent)


def test_files_that_come_with_the_package_have_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for file in FILES:
        assert read_deepspeed_json(file.stem, tmp_path) == json.loads(file.read_text())
    with pytest.raises(UserError, match=r"no file 'zreo2' \(looked at .*\); did you mean 'zero2'"):
        read_deepspeed_json("zreo2", tmp_path)
    mine = {"zero_optimization": {"stage": 1}}
    (tmp_path / "zero2").write_text(json.dumps(mine))
    assert read_deepspeed_json("zero2", tmp_path) == mine, "a file that is there comes first"


@every_file
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_deepspeed_reads_the_settings_as_they_are_meant(file: Path, precision: Any) -> None:
    zero = json.loads(file.read_text())["zero_optimization"]
    recipe = Recipe(train=dataclasses.replace(TRAIN, precision=precision), optim=OptimConfig(max_grad_norm=0.7))
    settings = deepspeed_settings(recipe, read_deepspeed_json(str(file)))
    understood = DeepSpeedConfig(settings)
    assert understood.train_micro_batch_size_per_gpu == 3
    assert understood.gradient_accumulation_steps == 5
    assert understood.gradient_clipping == 0.7
    assert understood.bfloat16_config.enabled is (precision == "bf16")
    assert understood.float16_config.enabled is (precision == "fp16")
    assert understood.zero_config.stage == zero["stage"]
    assert settings["zero_optimization"] == zero
    assert not {"optimizer", "scheduler"} & settings.keys(), "the trainer has its own"


def test_only_deepspeeds_own_adam_is_forced() -> None:
    for optim, forced in ((OptimConfig(name="adamw"), False), (OptimConfig(name="cpu_adam"), True)):
        settings = deepspeed_settings(Recipe(optim=optim), {})
        assert settings["zero_force_ds_cpu_optimizer"] is forced


@every_file
@pytest.mark.parametrize(
    ("precision", "gradients", "sums"), [("bf16", "fp32", "fp32"), ("fp16", "model", "fp16"), ("fp32", "model", "fp32")]
)
def test_gradients_are_accumulated_and_sent_in_one_precision(
    file: Path, precision: Any, gradients: Any, sums: str
) -> None:
    recipe = Recipe(train=dataclasses.replace(TRAIN, precision=precision, gradient_precision=gradients))
    understood = DeepSpeedConfig(deepspeed_settings(recipe, read_deepspeed_json(str(file))))
    assert understood.grad_accum_dtype == sums
    assert understood.communication_data_type == DTYPES[sums]


@every_file
@pytest.mark.parametrize("offload", ["cpu", "none"])
def test_the_teacher_is_sharded_and_keeps_no_gathered_copies(file: Path, offload: str) -> None:
    student = deepspeed_settings(Recipe(train=TRAIN), read_deepspeed_json(str(file)))
    settings = teacher_settings(student, offload)
    zero = DeepSpeedConfig(settings).zero_config
    assert (zero.stage, zero.param_persistence_threshold) == (3, 0)
    assert zero.offload_optimizer is None
    assert settings["bf16"] == {"enabled": True}
    assert (zero.offload_param and str(zero.offload_param.device)) == ("cpu" if offload == "cpu" else None)


@pytest.mark.parametrize(
    ("zero", "message"),
    [
        ({}, "zero_optimization.stage is 0; the teacher follows sharded weights: take 1, 2 or 3"),
        ({"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/x"}}, "nvme is not supported"),
        ({"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/x"}}, "nvme is not supported"),
        ({"stage": 2, "offload_param": {"device": "cpu"}}, "offload_param needs stage 3, this is stage 2"),
        ({"stage": 2, "round_robin_gradients": True}, "round_robin_gradients: .* follow wrong weights; remove it"),
    ],
)
def test_what_the_teacher_cannot_follow_is_refused(zero: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "z.json").write_text(json.dumps({"zero_optimization": zero}))
    with pytest.raises(UserError, match=message):
        read_deepspeed_json(str(tmp_path / "z.json"))


def test_a_path_that_begins_with_a_dot_is_meant_from_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder, stage in (("here", 3), ("recipes", 2)):
        (tmp_path / folder / "x").mkdir(parents=True)
        (tmp_path / folder / "z.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    monkeypatch.chdir(tmp_path / "here" / "x")
    assert read_deepspeed_json("../z.json", tmp_path / "recipes" / "x")["zero_optimization"]["stage"] == 2
