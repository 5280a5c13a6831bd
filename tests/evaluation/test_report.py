"""Scores as metrics, and what is said where there was nothing to compare."""

from __future__ import annotations

from typing import Any

import pytest

from ilvr_ds.evaluation.ablation import CONDITIONS
from ilvr_ds.evaluation.benchmarks import find_benchmark
from ilvr_ds.evaluation.report import metrics_of, summarize
from ilvr_ds.generation.settings import Speed
from ilvr_ds.tracking.names import metric_name


def scores_of(*types: str) -> dict[str, Any]:
    """Scores of which every type has another accuracy."""
    parts = {name: {"accuracy": number / 10} for number, name in enumerate(types)}
    return {"speed": {}, "rules": {"r": {"accuracy": 0.5, "macro_mean": 0.5, "types": parts}}}


def test_every_type_has_a_metric_of_its_own() -> None:
    types = ["", "all", "L(1)", "L[1]", "計数", "比較"]
    metrics = metrics_of(scores_of(*types))
    assert [metrics[metric_name("r/accuracy", name)] for name in types] == [number / 10 for number in range(6)]
    assert len(metrics) == 2 + len(types)


def test_samples_without_a_type_are_the_whole() -> None:
    assert metrics_of(scores_of("")) == {"r/accuracy": 0.5, "r/macro_mean": 0.5}


def line(number: int, segments: int, ablated: bool, cost: bool) -> dict[str, Any]:
    verdicts = {"exact-match": number == 0}
    made: dict[str, Any] = {
        "number": number, "type": "a", "options": 4, "verdicts": verdicts, "new_tokens": 10, "hit_limit": False,
        "steps": [3] * segments, "speed": Speed(1, 1.0, 1, 1.0).to_dict() if number == 0 else None,
    }  # fmt: skip
    if ablated:
        made["ablation"] = {name: {"verdicts": verdicts, "has_donor": segments > 0} for name in CONDITIONS}
    if cost:
        ways = ("latents", "pixels", "drawn")
        one = {"seconds": 2.0, "seconds_in_batch": 0.5, "tokens": 7 + number}
        made["cost"] = {**dict.fromkeys(ways, one), "rows": 64}
    return made


@pytest.mark.parametrize("segments", [0, 1])
def test_latents_that_no_answer_has_cannot_matter(segments: int) -> None:
    """Catches rows of +0.000 that look like a finding."""
    scores, text = summarize([line(n, segments, True, False) for n in range(2)], find_benchmark("exact-match"))
    rows = [row for row in text if row.strip().startswith(CONDITIONS)]
    assert len(rows) == (len(CONDITIONS) if segments else 0)
    said = "latents: no answer has a segment, so that there was nothing to put in their place"
    assert (said in text) == (segments == 0)
    assert not any("kept their own" in row for row in text)
    assert set(scores["ablation"]["exact-match"]) == set(CONDITIONS)


@pytest.mark.parametrize(("asked", "cost", "said"), [(True, False, 1), (True, True, 0), (False, False, 0)])
def test_a_comparison_with_nothing_to_compare_says_so(asked: bool, cost: bool, said: int) -> None:
    _, text = summarize([line(0, 0, False, cost)], find_benchmark("exact-match"), asked)
    none = "cost against pixels: no answer has a latent segment and a helper image to stand for it"
    assert text.count(none) == said
    assert sum(row.startswith("the same answer with ") for row in text) == (3 if cost else 0)


def test_costs_are_means_by_way() -> None:
    scores, text = summarize([line(n, 1, False, True) for n in range(2)], find_benchmark("exact-match"), True)
    assert scores["cost"]["drawn"] == {"tokens": 7.5, "seconds": 2.0, "seconds_in_batch": 0.5}
    assert (scores["cost"]["rows"], scores["cost"]["answers"]) == (64, 2)
    assert "the same answer with latents: alone 2.000 s, each of 64 0.5000 s, 7.5 tokens" in text
