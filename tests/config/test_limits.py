from __future__ import annotations

import typing

import pytest

from ilvr_ds.config import Recipe
from tests.config.mistakes import Load, mistake

NUMERIC = [
    f"{section}.{name}"
    for section, cls in typing.get_type_hints(Recipe).items()
    for name, kind in typing.get_type_hints(cls).items()
    if kind in (int, float)
]


def test_weights_that_are_all_zero_are_refused(load: Load) -> None:
    message = mistake(load, "loss: {ce_weight: 0, align_weight: 0, contrastive_weight: 0}")
    assert message.endswith("loss.ce_weight, loss.align_weight and loss.contrastive_weight are all 0")


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (
            "checkpoint: {keep_best: eval/ce}",
            "keep_best is eval/ce, but data.eval_shards is null: nothing is evaluated",
        ),
        ("train: {patience: 3}\nevaluation: {every_steps: 5}", "train.patience needs checkpoint.keep_best"),
        (
            "data: {shards: s, eval_shards: e}\ntrain: {patience: 3}\ncheckpoint: {keep_best: eval/ce}",
            "evaluation.every_steps is 0: there is one at the end only",
        ),
        ("evaluation: {generate_samples: 8}", "generate_samples is 8, but data.eval_shards is null; set it, or 0"),
        (
            "data: {shards: s, features: f, eval_shards: e, eval_features: f}\nevaluation: {generate_samples: 8}",
            "generate_samples is 8, but with stored features no tower sees a prompt; set it to 0",
        ),
        (
            "data: {shards: [{path: s, features: f, eval_shards: e, eval_features: f}]}\n"
            "evaluation: {generate_samples: 8}",
            "generate_samples is 8, but with stored features no tower sees a prompt; set it to 0",
        ),
        (
            "data: {shards: [s]}\ncheckpoint: {keep_best: eval/ce}",
            "keep_best is eval/ce, but data.eval_shards is null: nothing is evaluated",
        ),
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


@pytest.mark.parametrize("key", NUMERIC)
def test_every_number_has_a_range(load: Load, key: str) -> None:
    for value in (-(10**12), 10**12):
        assert "expected a value from" in mistake(load, "", f"{key}={value}")


@pytest.mark.parametrize("value", ["beta1=1", "beta2=1", "eps=0"])
def test_an_optimizer_that_divides_by_zero_is_refused(load: Load, value: str) -> None:
    """Catches a traceback after the model is loaded, and with eps 0 a NaN in every weight that had no gradient."""
    message = mistake(load, "", f"optim.{value}")
    assert "expected a value from" in message and f"optim.{value}" in message


def test_a_base_in_4_bits_needs_adapters(load: Load) -> None:
    said = mistake(load, "", "model.lora_base=nf4")
    assert said.endswith("model.lora_base is nf4, but all weights are trained; set model.lora_rank")
    assert load("", "model.lora_base=nf4", "model.lora_rank=8").model.lora_base == "nf4"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["selection.compare=nearest"], "selection.compare is nearest, but selection.pool is all; set it to changed"),
        (["selection.by=change"], "selection.by is change, but selection.pool is all; set it to changed"),
        (
            ["selection.unchanged=none", "selection.pool=changed"],
            "selection.unchanged is none, but selection.by is query, which needs the teacher's query for every "
            "picture; set it to change",
        ),
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
