"""Which samples a benchmark can judge, and by what."""

from __future__ import annotations

import json

import pytest

from ilvr_ds.data.sample import Sample, SampleError
from ilvr_ds.evaluation.benchmarks import BENCHMARKS, find_benchmark
from ilvr_ds.evaluation.scoring import RULES

QUESTION = "Which? A) red B) blue C) light blue D) green"


def sample(answer: str, question: str = QUESTION, **meta: str) -> Sample:
    return Sample("a", question, (), answer=answer, meta=meta)


def test_every_benchmark_says_by_which_version_of_which_rules_it_judges() -> None:
    for benchmark in BENCHMARKS.values():
        assert tuple(benchmark.versions()) == benchmark.rules
        assert all(RULES[rule].version == version for rule, version in benchmark.versions().items() if rule in RULES)


def test_options_stand_in_the_record_or_else_in_the_question() -> None:
    """Catches texts that reading a question would cut, and lists of something else."""
    benchmark = find_benchmark("comt")
    assert benchmark.options(sample("A")) == ["red", "blue", "light blue", "green"]
    listed = json.dumps(["(1, 2)", 7, "b;", "c"])
    assert benchmark.options(sample("A", option=listed)) == ["(1, 2)", "7", "b;", "c"]
    assert benchmark.options(sample("A", options=listed)) == ["(1, 2)", "7", "b;", "c"]
    for other in ("red", "3", '{"A": "x"}', "[[1]]", "[]"):
        assert benchmark.options(sample("A", option=other)) == ["red", "blue", "light blue", "green"]


@pytest.mark.parametrize("answer", ["A", "(d)", "B) blue", "light blue"])
def test_comt_judges_what_has_a_letter(answer: str) -> None:
    find_benchmark("comt").check(sample(answer))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (sample(""), "it has no answer"),
        (sample("70°"), "its answer '70°' is no option's letter or text; take --benchmark ilvr, which compares texts"),
        (sample("E", "Which?"), "its answer 'E' is no letter, and its options are not known; take --benchmark ilvr"),
        (sample("A", f"{QUESTION} E) pink"), "it has 5 options, CoMT's judge knows A to D; take option-letter"),
    ],
)
def test_comt_judges_nothing_else(given: Sample, words: str) -> None:
    with pytest.raises(SampleError) as caught:
        find_benchmark("comt").check(given)
    assert words in str(caught.value)


def test_comt_takes_a_letter_without_options() -> None:
    find_benchmark("comt").check(sample("B", "How many?"))


def test_option_letter_judges_no_answer_that_is_no_option() -> None:
    """Catches samples of which every response would be wrong."""
    benchmark = find_benchmark("option-letter")
    for answer in ("A", "(d)", "light blue"):
        benchmark.check(sample(answer))
    for answer in ("70°", "b"):
        benchmark.check(sample(answer, "Which?"))
    with pytest.raises(SampleError, match="'70°' is no option's letter or text; take --benchmark ilvr"):
        benchmark.check(sample("70°"))
    with pytest.raises(SampleError, match="it has no answer"):
        benchmark.check(sample(" "))
