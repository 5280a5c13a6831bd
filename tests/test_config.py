from __future__ import annotations

import ast
import dataclasses
import json
import re
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import ilvr_ds.config
from ilvr_ds import shipped
from ilvr_ds.config import Recipe, load_recipe, recipe_from_dict
from ilvr_ds.data.plan import SamplePlan
from ilvr_ds.errors import UserError

LAUNCH = Path(__file__).parent.parent / "launch"
MINIMAL = """\
run:
  name: r
data: {shards: s}
model: {path: m}
deepspeed: {config: d.json}
"""
SECTIONS = {field.name: typing.get_type_hints(Recipe)[field.name] for field in dataclasses.fields(Recipe)}
KEYS = [f"{section}.{field.name}" for section, cls in SECTIONS.items() for field in dataclasses.fields(cls)]
NUMERIC = [
    f"{section}.{name}"
    for section, cls in SECTIONS.items()
    for name, kind in typing.get_type_hints(cls).items()
    if kind in (int, float)
]

Load = Callable[..., Recipe]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Loads the minimal recipe with lines added behind its 5 lines."""

    def load(more: str = "", *overrides: str, text: str = MINIMAL) -> Recipe:
        path = tmp_path / "r.yaml"
        path.write_text(text + more)
        return load_recipe(path, overrides)

    return load


def mistake(load: Load, *arguments: Any, **more: Any) -> str:
    with pytest.raises(UserError) as caught:
        load(*arguments, **more)
    message = str(caught.value)
    assert "\n" not in message
    return message


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
        ("optim.lr=", "optim.lr is None; expected a number"),
        ("optim.lr=[1", "--set optim.lr=[1: the value is not valid YAML"),
        ("run.name=2024-13-45", "--set run.name=2024-13-45: the value is not valid YAML"),
        ("optim.lr=-1", "--set optim.lr=-1: optim.lr is -1.0; expected a value from 0 to 1000"),
        ("run.name=a/b", "run.name 'a/b' is not a plain folder name"),
        ("run.name='..'", "run.name '..' is not a plain folder name"),
    ],
)
def test_a_mistake_in_an_override_is_named(load: Load, override: str, words: str) -> None:
    assert words in mistake(load, "", override)


def test_weights_that_are_all_zero_are_refused(load: Load) -> None:
    message = mistake(load, "loss: {ce_weight: 0, align_weight: 0, contrastive_weight: 0}")
    assert message.endswith("loss.ce_weight, loss.align_weight and loss.contrastive_weight are all 0")


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (
            "train: {stage: 2, latent_gradient: full, micro_batch_tokens: 512}",
            "fills packed rows, but stage 2 with train.latent_gradient full has rows of its own; set it to 0",
        ),
        (
            "data: {shards: s, packing: false}\ntrain: {micro_batch_tokens: 512}",
            "but data.packing is false; set it to 0",
        ),
        (
            "data: {shards: s, packing: false}\nmodel: {path: m, attention: varlen}",
            "attention is varlen, but data.packing",
        ),
        (
            "train: {stage: 2, latent_gradient: full}\nmodel: {path: m, attention: varlen}",
            "is varlen, but stage 2 with train.latent_gradient full computes on PyTorch's SDPA",
        ),
        (
            "train: {stage: 2, latent_gradient: full}\nmodel: {path: m, attention: flash_attention_2}",
            "stage 2 with train.latent_gradient full computes on PyTorch's SDPA",
        ),
    ],
)
def test_what_needs_packed_rows_says_so(load: Load, lines: str, words: str) -> None:
    text = "run: {name: r}\ndeepspeed: {config: d.json}\n"
    text += "" if "data:" in lines else "data: {shards: s}\n"
    text += "" if "model:" in lines else "model: {path: m}\n"
    assert words in mistake(load, lines, text=text)


@pytest.mark.parametrize("name", ["comt_3b", "comt_7b", "authors_7b"])
def test_a_stage_1_recipe_becomes_one_of_stage_2_as_the_readme_says(name: str) -> None:
    root = Path(__file__).parent.parent
    text = (root / "README.md").read_text().split("## Stage 2")[1].split("\n## ")[0]
    ours, published = (yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL))
    for settings in (ours, ours | published):
        changes = [f"{section}.{key}={value}" for section, keys in settings.items() for key, value in keys.items()]
        recipe = load_recipe(root / f"launch/recipes/{name}.yaml", changes)
        assert recipe.train.has_free_latents
        assert recipe.has_teacher == recipe.packs == (settings is ours)


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


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("0", "train.latent_gradient is 0; expected a value from 1 to"),
        ("fulll", "is 'fulll'; valid: full, detached, an integer; did you mean 'full'?"),
        ("true", "is True; valid: full, detached, an integer"),
        ("1.5", "is 1.5; valid: full, detached, an integer"),
    ],
)
def test_a_latent_gradient_is_a_word_or_a_count(load: Load, value: str, words: str) -> None:
    assert words in mistake(load, "", f"train.latent_gradient={value}")
    assert load("", "train.latent_gradient=7").train.latent_gradient == 7


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("features: f, eval_shards: held", "so there is no vision tower to evaluate with: set data.eval_features too"),
        ("features: f, eval_features: e", "data.eval_features needs data.features and data.eval_shards beside it"),
        ("eval_shards: held, eval_features: e", "data.eval_features needs data.features and data.eval_shards beside"),
    ],
)
def test_stored_features_come_for_all_data_or_for_none(load: Load, data: str, words: str) -> None:
    """Catches an evaluation that would have no tower, and features that nobody reads."""
    message = mistake(load, "", *(f"data.{pair.replace(': ', '=')}" for pair in data.split(", ")))
    assert words in message


def test_overrides_beat_the_file_and_the_last_one_wins(load: Load) -> None:
    recipe = load("optim: {lr: 1, beta1: 0.5}", "optim.lr=2", "optim.lr=3")
    assert (recipe.optim.lr, recipe.optim.beta1) == (3.0, 0.5)


def test_an_override_can_supply_a_required_key(load: Load) -> None:
    text = MINIMAL.replace("model: {path: m}\n", "")
    assert load("", "model.path=x=y", text=text).model.path == "x=y"


@pytest.mark.parametrize("number", ["1e-5", "1.0e-5", "0.00001", "1E-5"])
def test_numbers_may_be_written_in_every_way(load: Load, number: str) -> None:
    assert load(f"optim: {{lr: {number}}}").optim.lr == load("", f"optim.lr={number}").optim.lr == 1e-5


def test_an_integer_stands_for_a_number(load: Load) -> None:
    lr = load("optim: {lr: 1}").optim.lr
    assert lr == 1.0 and type(lr) is float


def test_null_is_a_value_where_it_is_allowed(load: Load) -> None:
    assert load("tracking: {uri: ~}", "data.eval_shards=null").flat().items() >= {
        ("tracking.uri", None),
        ("data.eval_shards", None),
    }


def test_a_list_becomes_a_tuple(load: Load) -> None:
    assert load("", "model.lora_targets=[q_proj, v_proj]").model.lora_targets == ("q_proj", "v_proj")


def test_a_recipe_survives_json(load: Load) -> None:
    recipe = load("optim: {lr: 3e-4}\nmodel: {path: m, lora_targets: [q_proj]}", text=MINIMAL.replace("model", "#"))
    assert recipe_from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_the_run_folder_is_absolute(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load("", "run.output_dir=out").run_dir == tmp_path / "out" / "r"


@pytest.mark.parametrize("path", sorted((LAUNCH / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_loads_and_names_a_deepspeed_file(path: Path) -> None:
    named = shipped.deepspeed_files()[load_recipe(path).deepspeed.config]
    assert named.parent.name == "ds_configs" and named.is_file()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("lr=1", "unknown key 'lr'; did you mean 'optim.lr'?"),
        ("name=x", "unknown key 'name'; did you mean 'optim.name' or 'run.name'?"),
    ],
)
def test_a_key_without_its_section_gets_it(load: Load, override: str, words: str) -> None:
    assert words in mistake(load, "", override)


def test_a_date_is_a_name_as_it_was_written(load: Load) -> None:
    assert load("", "run.name=2026-11-28").run.name == "2026-11-28"


@pytest.mark.parametrize("value", ["42", "2026-11-28 10:00:00", "1.5"])
def test_what_yaml_takes_for_no_text_may_be_quoted(load: Load, value: str) -> None:
    assert "expected a string; to have it as text, quote it" in mistake(load, "", f"run.name={value}")
    assert load("", f"run.name='{value}'").run.name == value


def test_every_key_has_a_docstring_under_it() -> None:
    documented = set()
    for node in ast.parse(Path(ilvr_ds.config.__file__).read_text()).body:
        if not isinstance(node, ast.ClassDef):
            continue
        section = next((s for s, cls in SECTIONS.items() if cls.__name__ == node.name), None)
        for field, below in zip(node.body, node.body[1:], strict=False):
            is_text = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
            if isinstance(field, ast.AnnAssign) and is_text:
                documented.add(f"{section}.{ast.unparse(field.target)}")
    assert set(KEYS) - documented == set()


@pytest.mark.parametrize("key", NUMERIC)
def test_every_number_has_a_range(load: Load, key: str) -> None:
    for value in (-(10**12), 10**12):
        assert "expected a value from" in mistake(load, "", f"{key}={value}")


@pytest.mark.parametrize(
    ("name", "worlds"),
    [("demo", (1, 2)), ("comt_3b", (1, 2)), ("comt_7b", (8,)), ("authors_7b", (8,)), ("vsp_7b", (8,))],
)
def test_recipes_run_on_the_devices_that_they_name(name: str, worlds: tuple[int, ...]) -> None:
    """Catches lanes that do not fit the number of GPUs in a recipe's first line."""
    recipe = load_recipe(Path(__file__).parent.parent / "launch/recipes" / f"{name}.yaml")
    for world in worlds:
        batch = recipe.train.micro_batch_size * recipe.train.grad_accum_steps * world
        SamplePlan((10_000,), 0, recipe.data.lanes, batch).check_world(world)


@pytest.mark.parametrize(("written", "kind"), [("true", "full"), ("false", "none"), ("selective", "selective")])
def test_checkpointing_may_be_said_as_before(load: Load, written: str, kind: str) -> None:
    """Recipes, and checkpoints, that say true or false stay valid; other yes-or-no for words are still mistakes."""
    assert load("", f"model.activation_checkpointing={written}").model.activation_checkpointing == kind
    assert mistake(load, "", "model.attention=true").startswith("--set model.attention=true: model.attention is True")


def test_a_base_in_4_bits_needs_adapters(load: Load) -> None:
    said = mistake(load, "", "model.lora_base=nf4")
    assert said.endswith("model.lora_base is nf4, but all weights are trained; set model.lora_rank")
    assert load("", "model.lora_base=nf4", "model.lora_rank=8").model.lora_base == "nf4"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["selection.by=change"], "selection.by is change, but selection.pool is all; set it to changed"),
        (["selection.by=change", "selection.pool=region"], "selection.by is change, but selection.pool is region"),
        (
            ["selection.pool=changed", "selection.pool_size=3"],
            "pool_size is 3, less than model.latent_size 8; 0 takes 16",
        ),
        (["selection.pool=changed", "selection.pool_min=17"], "pool_min is 17, but a pool holds at most 16; lower it"),
        (["selection.pool=change"], "valid: all, changed, region; did you mean 'changed'?"),
    ],
)
def test_a_pool_and_what_ranks_in_it_fit_together(load: Load, overrides: list[str], words: str) -> None:
    assert words in mistake(load, "", *overrides)


def test_a_rollout_with_gradients_has_no_selective_checkpointing(load: Load) -> None:
    changes = ["train.stage=2", "model.activation_checkpointing=selective"]
    said = mistake(load, "", *changes, "train.latent_gradient=full")
    assert said.endswith("selective, which stage 2 with train.latent_gradient full does not have; valid: none, full")
    assert load("", *changes).model.activation_checkpointing == "selective"
