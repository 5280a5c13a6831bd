"""What `data.shards` may be as a list, and the one line that each mistake gives."""

from __future__ import annotations

import json
import re

import pytest

from ilvr_ds.config import DataSetConfig, recipe_from_dict
from tests.config.mistakes import Load, mistake


def test_a_list_of_paths_is_each_set_once_and_named_by_what_differs(load: Load) -> None:
    recipe = load("", "data.shards=[data/comt/train, data/zebra/train/, https://host/vsp/train]")
    assert recipe.data.sets == tuple(
        DataSetConfig(path, name, epochs=1.0)
        for path, name in (
            ("data/comt/train", "comt"), ("data/zebra/train/", "zebra"), ("https://host/vsp/train", "vsp"),
        )
    )  # fmt: skip
    assert [entry.name for entry in load("", "data.shards=[a/x, b/y, y/z]").data.sets] == ["x", "y", "z"]
    assert [entry.name for entry in load("", "data.shards=[a/x]").data.sets] == ["x"]


def test_entries_have_weights_or_epochs_and_held_out_data_of_their_own(load: Load) -> None:
    lines = """\
  - {path: a, weight: 3, eval_shards: held, name: comt}
  - {path: b, weight: 1e-1}
"""
    text = f"run: {{name: r}}\ndata:\n  shards:\n{lines}model: {{path: m}}\ndeepspeed: {{config: d}}\n"
    recipe = load(text=text)
    assert [(s.name, s.weight, s.epochs) for s in recipe.data.sets] == [("comt", 3.0, None), ("b", 0.1, None)]
    assert recipe.data.held_out_sets == (DataSetConfig("held", "comt"),)
    recipe = load("", "data.shards=[{path: a, epochs: 0.5}, b]")
    assert [s.epochs for s in recipe.data.sets] == [0.5, 1.0]


def test_held_out_data_of_a_mixtures_sets_are_held_out_data(load: Load) -> None:
    recipe = load(
        "train: {patience: 2}\nevaluation: {every_steps: 5, generate_samples: 4}\ncheckpoint: {keep_best: eval/ce}",
        "data.shards=[{path: a, eval_shards: h}, b]",
    )
    assert recipe.checkpoint.keep_best == "eval/ce" and recipe.evaluation.generate_samples == 4


def test_a_mixture_survives_a_checkpoint(load: Load) -> None:
    recipe = load("", "data.shards=[{path: a, weight: 2}, {path: b, weight: 1, eval_shards: h}]")
    assert recipe_from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_one_path_stays_one_path(load: Load) -> None:
    data = load("", "data.eval_shards=h").data
    assert not data.is_mixture and data.sets == (DataSetConfig("s"),)
    assert data.held_out_sets == (DataSetConfig("h"),)


@pytest.mark.parametrize(
    ("shards", "words"),
    [
        ("[]", "data.shards: the list is empty"),
        ("[{path: a, wieght: 2}]", "data.shards, entry 1: unknown key 'wieght'; did you mean 'weight'?"),
        ("[a, {weight: 2}]", "data.shards, entry 2: has no path"),
        ("[a, 3]", "data.shards, entry 2 is 3; expected a path, or {path, weight} or {path, epochs}"),
        ("[{path: 3}]", "entry 1: path is 3; expected a string"),
        ("[{path: ''}]", "entry 1: path is ''; expected a string"),
        ("[{path: a, weight: 0}]", "entry 1: weight is 0; expected a number above 0, .* remove its entry"),
        ("[{path: a, weight: -1}]", "entry 1: weight is -1; expected a number above 0"),
        ("[{path: a, epochs: 0}]", "entry 1: epochs is 0; expected a number above 0"),
        ("[{path: a, epochs: .nan}]", "entry 1: epochs is nan; expected a number above 0"),
        ("[{path: a, weight: .inf}]", "entry 1: weight is inf; expected a number above 0"),
        ("[{path: a, weight: true}]", "entry 1: weight is True; expected a number"),
        ("[{path: a, weight: much}]", "entry 1: weight is 'much'; expected a number"),
        ("[{path: a, weight: 1, epochs: 1}]", "entry 1: has weight and epochs, .* keep one"),
        ("[{path: a, weight: 1}, b]", "a has a weight, b has none; give all sets a weight, or none"),
        ("[{path: a, weight: 1}, {path: b, epochs: 2}]", "a has a weight, b has epochs 2; give all"),
        ("[d/a, d/b, ./d/a/]", r"data.shards: \S+/d/a stands there 2 times; give one entry more weight or epochs"),
        ("[x/t, y/t, y/o]", "x/t and y/t are both called 't'; give each entry a name of its own"),
        ("[{path: a, name: n}, {path: b, name: n}]", "a and b are both called 'n'"),
        ("[{path: a, eval_features: f}]", "eval_features needs features and eval_shards beside it"),
        ("[{path: a, features: f}, b]", "some sets have features, b none; ilvr-ds encode --shards PATH"),
        ("[{path: a, features: f, eval_shards: h}]", "give eval_features of the entry a of data.shards"),
    ],
)
def test_a_mistake_in_the_list_is_one_line(load: Load, shards: str, words: str) -> None:
    message = mistake(load, "", f"data.shards={shards}")
    assert re.search(words, message), message


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("data.features=f", "data.features is that of one data set, but data.shards is a list"),
        ("data.eval_shards=h", "data.eval_shards is set, and so are eval_shards of a in data.shards; keep one"),
        ("data.eval_features=h", "data.eval_features needs data.eval_shards beside it"),
    ],
)
def test_keys_of_one_data_set_do_not_fit_a_mixture(load: Load, more: str, words: str) -> None:
    assert words in mistake(load, "", "data.shards=[{path: a, eval_shards: x}, b]", more)


def test_a_mixture_may_have_one_held_out_set_for_all(load: Load) -> None:
    data = load("", "data.shards=[a, b]", "data.eval_shards=h").data
    assert data.held_out_sets == (DataSetConfig("h"),)
