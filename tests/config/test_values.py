from __future__ import annotations

import pytest

from tests.config.mistakes import Load, mistake


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


def test_a_date_is_a_name_as_it_was_written(load: Load) -> None:
    assert load("", "run.name=2026-11-28").run.name == "2026-11-28"


@pytest.mark.parametrize("value", ["42", "2026-11-28 10:00:00", "1.5"])
def test_what_yaml_takes_for_no_text_may_be_quoted(load: Load, value: str) -> None:
    assert "expected a string; to have it as text, quote it" in mistake(load, "", f"run.name={value}")
    assert load("", f"run.name='{value}'").run.name == value


@pytest.mark.parametrize(("written", "kind"), [("true", "full"), ("false", "none"), ("selective", "selective")])
def test_checkpointing_may_be_said_as_before(load: Load, written: str, kind: str) -> None:
    """Recipes, and checkpoints, that say true or false stay valid; other yes-or-no for words are still mistakes."""
    assert load("", f"model.activation_checkpointing={written}").model.activation_checkpointing == kind
    assert mistake(load, "", "model.attention=true").startswith("--set model.attention=true: model.attention is True")
