from __future__ import annotations

from pathlib import Path

import pytest

from ilvr_ds.config import load_recipe, recipe_from_dict
from ilvr_ds.errors import UserError
from tests.config.mistakes import MINIMAL, Load, mistake


def test_the_required_keys_are_enough(load: Load) -> None:
    recipe = load()
    assert (recipe.run.name, recipe.data.shards, recipe.deepspeed.config) == ("r", "s", "d.json")
    assert recipe.optim.lr == 1e-5


@pytest.mark.parametrize(
    ("lines", "line", "words"),
    [
        ("optimizer: {lr: 1}", 6, "unknown section 'optimizer'; did you mean 'optim'?"),
        ("optim:\n  weight_dekay: 1", 7, "unknown key 'optim.weight_dekay'; did you mean 'optim.weight_decay'?"),
        ("train:\n  epochs: 1\n  max_steps: many", 8, "train.max_steps is 'many'; expected an integer"),
        ("train: {epochs: 1.5}", 6, "train.epochs is 1.5; expected an integer"),
        ("train: {epochs: true}", 6, "train.epochs is True; expected an integer"),
        ("optim: {lr: fast}", 6, "optim.lr is 'fast'; expected a number"),
        ("optim: {lr: true}", 6, "optim.lr is True; expected a number"),
        ("tracking: {experiment: 7}", 6, "tracking.experiment is 7; expected a string"),
        ("data: {blank_images: 1}", 6, "data.blank_images is 1; expected true or false"),
        ("model: {lora_targets: q_proj}", 6, "model.lora_targets is 'q_proj'; expected a list of strings"),
        ("model: {lora_targets: [1]}", 6, "model.lora_targets is [1]; expected a list of strings"),
        ("optim: {lr: {peak: 1}}", 6, "optim.lr is {'peak': 1}; expected a number"),
        ("train: {epochs: }", 6, "train.epochs is None; expected an integer"),
        ("optim: {lr: ~}", 6, "optim.lr is None; expected a number"),
        ("selection: {top_p: 1.5}", 6, "selection.top_p is 1.5; expected a value from 1e-06 to 1"),
        ("optim: {lr: .nan}", 6, "optim.lr is nan; expected a value from 0 to 1000"),
        ("data: {lanes: 0}", 6, "data.lanes is 0; expected a value from 1 to"),
        ("train: {precision: bf61}", 6, "train.precision is 'bf61'; valid: fp32, bf16, fp16; did you mean 'bf16'?"),
        ("train: {stage: 3}", 6, "train.stage is 3; valid: 1, 2"),
        ("train: {stage: true}", 6, "train.stage is True; valid: 1"),
        ("optim: 3", 6, "section 'optim' must be a mapping"),
        ("optim:", 6, "section 'optim' must be a mapping"),
        ("optim:\n  lr: 1\n  eps: 0\n  lr: 2", 9, "optim.lr stands here twice (first: "),
        ("optim: {lr: [1}", 6, "not valid YAML"),
        ("optim:\n\tlr: 1", 7, "not valid YAML"),
        ("optim: {lr: !!python/tuple [1]}", 6, "not valid YAML"),
        ("run: {output_dir: 2024-13-45}", 6, "not valid YAML"),
        ("optim: {lr: *nowhere}", 6, "not valid YAML"),
    ],
)
def test_a_mistake_is_named_with_its_line(load: Load, lines: str, line: int, words: str) -> None:
    message = mistake(load, lines)
    assert words in message
    assert f"r.yaml:{line}: " in message


@pytest.mark.parametrize("text", ["", "# nothing but a comment\n"])
def test_an_empty_file_is_a_mistake(load: Load, text: str) -> None:
    assert "r.yaml:1: the recipe must be a mapping" in mistake(load, text=text)


def test_unprintable_characters_are_a_mistake_in_one_line(load: Load) -> None:
    assert "r.yaml: not valid YAML (unacceptable character #x0000" in mistake(load, "optim: {lr: \0}")


def test_a_list_is_no_recipe(load: Load) -> None:
    assert "r.yaml:1: the recipe must be a mapping" in mistake(load, text="- run\n")


def test_all_missing_required_keys_are_named(load: Load) -> None:
    message = mistake(load, text="run: {name: r}\n")
    assert message.endswith("r.yaml: missing data.shards, model.path, deepspeed.config")


def test_a_file_that_cannot_be_read_is_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes("run: {name: grün}\n".encode("latin-1"))
    for name, reason in (("none.yaml", "No such file"), (".", "Is a directory"), ("latin.yaml", "UTF-8")):
        with pytest.raises(UserError, match=f"cannot read the recipe .*{reason}"):
            load_recipe(tmp_path / name)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim.lr", "--set optim.lr: expected section.key=value"),
        ("optim.learning_rate=1", "--set optim.learning_rate=1: unknown key 'optim.learning_rate'"),
        ("model.latent_sise=1", "did you mean 'model.latent_size'?"),
        ("data.shuffle_window=8", "did you mean 'data.shuffle_buffer'?"),
        ("optim=1", "--set optim=1: unknown key 'optim'"),
        ("optim.lr=", "--set optim.lr=: no value; null stands for none"),
        ("data.eval_shards=", "--set data.eval_shards=: no value; null stands for none"),  # a shell's unset variable
        ("optim.lr=null", "optim.lr is None; expected a number"),
        ("data.shards=[{path: a, weight: 3, weight: 2}]", "}]: 'weight' stands twice in one mapping"),
        ("train.max_steps=010", "010 is a number of base 8 in YAML; write it in base 10, or as text: \"'010'\""),
        ("run.stall_timeout_s=1:30", "1:30 is a number of base 60 in YAML"),
        ("run.stall_timeout_s=1:30.5", "1:30.5 is a number of base 60 in YAML"),
        ("run.output_dir=~/runs", "run.output_dir '~/runs': ~ and variables are a shell's; write the whole path"),
        ("run.output_dir=$SCRATCH/runs", "run.output_dir '$SCRATCH/runs': ~ and variables are a shell's"),
        ("optim.lr=[1", "--set optim.lr=[1: the value is not valid YAML"),
        ("run.name=2024-13-45", "--set run.name=2024-13-45: the value is not valid YAML"),
        ("optim.lr=-1", "--set optim.lr=-1: optim.lr is -1.0; expected a value from 0 to 1000"),
        ("run.name=a/b", "run.name 'a/b' is not a plain folder name"),
        ("run.name='..'", "run.name '..' is not a plain folder name"),
    ],
)
def test_a_mistake_in_an_override_is_named(load: Load, override: str, words: str) -> None:
    assert words in mistake(load, "", override)


def test_a_key_that_stands_twice_in_an_entry_of_a_list_is_named_with_its_line(load: Load) -> None:
    """PyYAML alone takes the last and says nothing."""
    text = "run: {name: r}\ndata:\n  shards:\n  - {path: a, weight: 3, weight: 2}\nmodel: {path: m}\n"
    assert mistake(load, text=text).endswith("r.yaml:3: 'weight' stands twice in one mapping")


def test_a_run_that_lies_in_a_folder_named_by_a_tilde_can_be_read(load: Load) -> None:
    """As earlier versions made it."""
    plain = load().to_dict()
    plain["run"]["output_dir"] = "~/runs"
    assert recipe_from_dict(plain).run.output_dir == "~/runs"


def test_numbers_of_other_kinds_are_what_they_seem(load: Load) -> None:
    text = MINIMAL.replace("name: r", "name: '007'")
    recipe = load("train: {max_steps: 1_000}", "run.seed=0x10", "optim.lr=0.5", text=text)
    assert (recipe.train.max_steps, recipe.run.name, recipe.run.seed, recipe.optim.lr) == (1000, "007", 16, 0.5)
    assert load("", "run.seed=0", "optim.weight_decay=00.5").optim.weight_decay == 0.5


def test_overrides_beat_the_file_and_the_last_one_wins(load: Load) -> None:
    recipe = load("optim: {lr: 1, beta1: 0.5}", "optim.lr=2", "optim.lr=3")
    assert (recipe.optim.lr, recipe.optim.beta1) == (3.0, 0.5)


def test_an_override_can_supply_a_required_key(load: Load) -> None:
    text = MINIMAL.replace("model: {path: m}\n", "")
    assert load("", "model.path=x=y", text=text).model.path == "x=y"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("lr=1", "unknown key 'lr'; did you mean 'optim.lr'?"),
        ("name=x", "unknown key 'name'; did you mean 'optim.name' or 'run.name'?"),
    ],
)
def test_a_key_without_its_section_gets_it(load: Load, override: str, words: str) -> None:
    assert words in mistake(load, "", override)
